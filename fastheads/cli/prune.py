"""`fastheads prune`: choose heads by a profile or a file, write the pruned model, show what it costs."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from fastheads.cli.messages import doing, fail, note
from fastheads.cli.options import Device, GroupBy, Mode, ModelName
from fastheads.errors import LoadError, OptionError

if TYPE_CHECKING:
    from fastheads.intervene.plan import PruningPlan
    from fastheads.results.head_profile import HeadProfile
    from fastheads.run.pruned_folder import Comparison


SEQ_LEN = 256
INTERRUPTED = 130
EXAMPLE = "Example: fastheads prune my-llama --profile heads.safetensors --fraction 0.1 -o my-llama-pruned"


def prune(
    *,
    model: ModelName = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for the pruned model.", show_default=False)
    ],
    profile: Annotated[
        Path | None,
        typer.Option(
            help="A profile of the model, by which heads are chosen, and which holds their means.",
            show_default=False,
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            help="Of the heads, 0 to 1, lowest first; with --uniform of each layer's KV groups.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --fraction: a plan that an earlier run wrote, or JSON pairs, as in \\[\\[0, 3], \\[2, 1]].",
            show_default=False,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Cut out whole KV groups, as many in each layer, so that the model gets smaller and faster.",
        ),
    ] = False,
    group_by: Annotated[
        GroupBy,
        typer.Option(
            metavar="sum|max",
            help="With --uniform: a KV group counts as much as its query heads' sum, or maximum.",
        ),
    ] = GroupBy.sum,
    mode: Annotated[
        Mode,
        typer.Option(
            metavar="zero|mean",
            help="What takes the place of a head: zero, or its mean output, as a bias of the output projection.",
        ),
    ] = Mode.zero,
    metric: Annotated[
        str | None,
        typer.Option(
            help="A metric of the profile, by which heads are chosen.",
            show_default="head_residual_ratio; with --mode mean the mean-ablation error per residual",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text on which the loss before and after is measured: its beginning.",
            show_default="docstrings of Python's standard library",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of the text.")] = 32,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.", show_default="256, or the model's limit if that is less"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Pairs of forwards that the speed is measured with.")] = 5,
    dtype: Annotated[
        str, typer.Option(help="Of the model: auto (that of the profile), float32, bfloat16 or float16.")
    ] = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the model in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Remove the lowest heads of a model, and write a folder that transformers loads.

    By default the heads' columns of the output projections are zeroed: the model stays as large. With --uniform whole KV groups
    are cut out of the weights. The folder is loaded again, and parameters, loss and speed before and after are measured.
    """
    if (fraction is None) == (heads is None):
        raise OptionError("give either --fraction, with --profile, or --heads")
    if fraction is not None and profile is None:
        raise OptionError("--fraction needs --profile, by which heads are chosen")
    if fraction is not None and not 0 < fraction < 1:
        raise OptionError(f"--fraction must be between 0 and 1, not {fraction}")
    if heads is not None and metric is not None:
        raise OptionError("--metric chooses heads by --profile: leave it out with --heads")
    if mode == Mode.mean and profile is None:
        raise OptionError("--mode mean needs --profile, which holds the heads' means")
    for option, value, least in (
        ("--sequences", sequences, 1),
        ("--seq-len", SEQ_LEN if seq_len is None else seq_len, 2),
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise OptionError(f"{option} must be at least {least}, not {value}")
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    # Only on a terminal: elsewhere a wrong option would print two lines instead of one.
    with doing("starting", terminal) if terminal.is_terminal else nullcontext():
        from fastheads.corpus.docstrings import docstrings_text
        from fastheads.corpus.opening import open_source
        from fastheads.intervene.plan import PruningPlan, plan_pruning
        from fastheads.intervene.pruning import check_prunable
        from fastheads.results.head_profile import HeadProfile
        from fastheads.run import loading
        from fastheads.run.pruned_folder import check_folder, compare_models, text_sequences, write_pruned

        found = loading.find_model(model)
        check_folder(output, force=force, source=found.folder if found.is_local else None)
        measured = None if profile is None else HeadProfile.load(profile)
        given = None if heads is None else _plan_of_file(PruningPlan.load(heads), mode.value, uniform)
        text: Any = docstrings_text() if data is None else open_source(data)
    with doing(f"loading {found.name}", terminal):
        loaded = loading.load_model(found, dtype=_dtype(dtype, given, measured), device=device)
        check_prunable(loaded)
        tokenizer = _tokenizer(found)
        seq_len = _fitting(seq_len, loaded)
        blocks = None
        if tokenizer is not None:
            blocks = text_sequences(text, tokenizer, number=sequences, seq_len=seq_len)
    with doing("pruning", terminal):
        if given is None:
            assert measured is not None and fraction is not None
            plan = plan_pruning(
                measured,
                loaded,
                fraction,
                metric=metric,
                mode=mode.value,
                uniform=uniform,
                group_by=group_by.value,
            )
        else:
            plan = given.filled_in(loaded)
        after = write_pruned(
            loaded,
            plan,
            output,
            profile=measured,
            tokenizer=tokenizer,
            stored_dtype=loading.stored_dtype(found) if dtype == "auto" else None,
            force=force,
        )
    comparison = None
    if blocks is not None:
        try:
            with doing("measuring loss and speed before and after", terminal):
                comparison = compare_models(loaded, after, blocks, rounds=rounds)
        except KeyboardInterrupt:
            line = f"interrupted: {output} is written, and not measured"
            raise typer.Exit(fail(line, INTERRUPTED)) from None
    result = _result(plan, output, (loaded, after), comparison, text=text.name, seq_len=seq_len)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _show(result, plan, Console(highlight=False))


def _plan_of_file(plan: "PruningPlan", mode: "Literal['zero', 'mean']", uniform: bool) -> "PruningPlan":
    """Return the plan with the mode and the kind that the command line asks for."""
    from dataclasses import replace

    if plan.mode == "mean" and mode == "zero":
        raise OptionError(
            "the plan is for --mode mean: give that, and the --profile that holds the heads' means"
        )
    if plan.uniform and not uniform:
        raise OptionError("the plan is for --uniform: give that too")
    return replace(plan, mode=mode, uniform=uniform)


def _dtype(dtype: str, plan: "PruningPlan | None", profile: "HeadProfile | None") -> str:
    """Return the dtype to load the model in: that in which it was profiled, since the fingerprint is of those weights."""
    from fastheads.run.loading import DTYPES

    weights = plan.weights if plan is not None and plan.weights else None
    if weights is None and profile is not None:
        weights = profile.metadata.get("weights")
    dtypes = weights.get("dtypes") if isinstance(weights, dict) else None
    single = dtypes[0] if isinstance(dtypes, list) and len(dtypes) == 1 else None
    return single if dtype == "auto" and single in DTYPES else dtype


def _fitting(seq_len: int | None, model: Any) -> int:
    """Return `seq_len`, or its default, as far as the model has positions."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and seq_len is not None and seq_len > limit:
        raise OptionError(f"--seq-len {seq_len} is more than the model's max_position_embeddings, {limit}")
    return seq_len or min(SEQ_LEN, limit or SEQ_LEN)


def _tokenizer(source: Any) -> Any:
    """Return the model's tokenizer; None, with a note, if it has none."""
    from fastheads.run import loading

    try:
        return loading.load_tokenizer(source)
    except LoadError as error:
        note(f"no tokenizer is written, and loss and speed are not measured: {error}")
        return None


def _result(
    plan: "PruningPlan",
    output: Path,
    models: tuple[Any, Any],
    comparison: "Comparison | None",
    *,
    text: str,
    seq_len: int,
) -> dict[str, Any]:
    """Collect what is printed, as JSON values."""
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    found: dict[str, Any] = {
        "folder": str(output),
        "heads": [list(pair) for pair in plan.heads],
        "kv_groups": [list(pair) for pair in plan.kv_groups],
        "metric": plan.metric,
        "mode": plan.mode,
        "uniform": plan.uniform,
        "options": plan.options,
        "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
        "bytes": weights,
    }
    if comparison is not None:
        values = asdict(comparison)
        found |= {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        found["rise_sem"] = None if math.isnan(comparison.rise_sem) else comparison.rise_sem
        found |= {
            "text": text,
            "seq_len": seq_len,
            "device": str(models[0].device),
            "dtype": str(models[0].dtype).removeprefix("torch."),
        }
    return found


def _show(result: dict[str, Any], plan: "PruningPlan", console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "before", "after", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    before, after = result["parameters"]
    table.add_row(
        "parameters",
        f"{before:,}",
        f"{after:,}",
        f"{after / before - 1:+.1%}" if after != before else "as many",
    )
    if "loss" in result:
        sem = "" if result["rise_sem"] is None else f" ± {result['rise_sem']:.4f}"
        table.add_row("loss", *(f"{value:.4f}" for value in result["loss"]), f"{result['rise']:+.4f}{sem}")
        ratios = result["speed_ratios"]
        spread = f"x {result['speed_ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        table.add_row("tokens/s", *(f"{value:,.0f}" for value in result["tokens_per_second"]), spread)
    how = (
        "cut out, with their KV groups"
        if plan.uniform
        else "zeroed"
        if plan.mode == "zero"
        else "replaced by their means"
    )
    by = f", chosen by {plan.metric}" if plan.metric else ""
    if "group_by" in plan.options:
        by += f" ({plan.options['group_by']} over each KV group)"
    layers = len(plan.by_layer)
    console.print(f"{len(plan.heads)} heads of {layers} layers {how}{by}\n", markup=False, soft_wrap=True)
    console.print(table)
    if "loss" in result:
        console.print(
            f"\nloss: nats per token over {result['sequences']} sequences of {result['seq_len']} tokens of {result['text']}, "
            f"± the standard error of the rise\ntokens/s: of whole forwards, in turns ({result['device']}, {result['dtype']})",
            markup=False,
            soft_wrap=True,
        )
    folder = result["folder"]
    console.print(
        f"\nsaved {folder}; load it with: transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
        markup=False,
        soft_wrap=True,
    )
