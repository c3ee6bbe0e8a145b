"""`fastheads show`: a saved profile as tables, a heatmap, a picture, CSV or JSON."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastheads.cli.checks import check_mode
from fastheads.cli.messages import doing, note
from fastheads.cli.options import Device, Dtype, Heads, Metric, Mode, TrustRemoteCode
from fastheads.errors import OptionError

if TYPE_CHECKING:
    from fastheads.results.head_profile import HeadProfile
    from fastheads.results.ranking import Ranking

LISTED = 10  # heads in a table


def show(
    context: typer.Context,
    *,
    file: Annotated[
        Path, typer.Argument(help="A profile that `fastheads profile` wrote.", show_default=False)
    ],
    metric: Metric = None,
    heads: Heads = LISTED,
    top: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="List the N highest heads.", show_default=False),
    ] = None,
    bottom: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="List the N lowest heads.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw a heatmap into this file: .png, .pdf or .svg.", show_default=False),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print the ranking as CSV, all heads.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as JSON, all heads.")] = False,
    mode: Annotated[
        Mode,
        typer.Option(
            metavar="MODE",
            help="What heads are to be replaced with. zero: rank by --metric. mean: by the error of replacing a head with its "
            "mean, which needs --model.",
        ),
    ] = Mode.zero,
    model: Annotated[
        str | None,
        typer.Option(
            help="For --mode mean: the model that was profiled, a local folder, a GGUF file or a Hub id.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print a saved profile: its highest and lowest heads and a heatmap.

    --csv and --json print the ranking instead, highest first, whole or what --top, --bottom or --heads leave of it.
    """
    from fastheads.results.head_profile import HeadProfile

    if heads is not None and heads < 1:
        raise OptionError(f"--heads must be at least 1, or all, not {heads}")
    source = context.get_parameter_source("heads")
    given = source is not None and source.name != "DEFAULT"
    if given and (top is not None or bottom is not None):
        raise OptionError("give either --heads, or --top and --bottom")
    if csv and as_json:
        raise OptionError("give either --csv or --json")
    check_mode(mode, metric, model)
    if plot is not None:
        _check_plot(plot)
    result = HeadProfile.load(file)
    loaded = None
    if model is not None:
        with doing(f"loading {model}", Console(stderr=True, file=sys.stderr, highlight=False)):
            from fastheads.run import loading

            loaded = loading.load_model(
                loading.find_model(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
    if plot is not None:
        from fastheads.results.plots import save_heatmap

        save_heatmap(result, plot, metric)
    if csv or as_json:
        if top is None and bottom is None and given:
            top = bottom = heads
        typer.echo(_ranking_text(result, metric, loaded, ends=(top, bottom), as_json=as_json), nl=False)
    else:
        show_profile(result, metric, heads, model=loaded, top=top, bottom=bottom)
    if plot is not None:
        note(f"drawn {plot}")


def show_profile(
    result: "HeadProfile", metric: str | None = None, heads: int | None = LISTED, **options: Any
) -> None:
    """Print a profile on stdout, as `terminal.show` does."""
    from fastheads.run import terminal

    terminal.show(result, metric, Console(highlight=False), heads, **options)


def _check_plot(path: Path) -> None:
    """Raise now if drawing into `path` would fail."""
    from fastheads.results.files import check_writable
    from fastheads.results.plots import check_installed, picture_format

    check_installed()
    picture_format(path)
    check_writable(path)


def _ranking_text(
    profile: "HeadProfile",
    metric: str | None,
    model: Any,
    *,
    ends: tuple[int | None, int | None],
    as_json: bool,
) -> str:
    """Return the ranking, highest first, as CSV or JSON; `ends`: only so many of the highest and of the lowest heads."""
    from fastheads.results.tables import RANKED, csv_of, ranked_rows
    from fastheads.run.terminal import ranking_to_show

    ranking, missing = ranking_to_show(profile, metric, model)
    if missing:
        note(f"{ranking.name} is {missing}")
    chosen = _ends(ranking, *ends)
    rows = [row for row in ranked_rows(profile, ranking) if chosen is None or row["rank"] in chosen]
    if not as_json:
        return csv_of(rows, RANKED)
    rows = [{name: None if _is_nan(value) else value for name, value in row.items()} for row in rows]
    document = {
        "model": str(profile.metadata.get("model", "?")),
        "metric": ranking.name,
        "token_agg": profile.metadata.get("token_agg"),
        "skip_first": profile.metadata.get("skip_first"),
        "heads": rows,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _ends(ranking: "Ranking", top: int | None, bottom: int | None) -> set[int] | None:
    """Return the ranks of the `top` highest and the `bottom` lowest heads; None: all."""
    if top is None and bottom is None:
        return None
    ranked = int(ranking.measured.sum())
    return {*range(1, (top or 0) + 1), *range(ranked - (bottom or 0) + 1, ranked + 1)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
