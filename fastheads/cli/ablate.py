"""`fastheads ablate`: check a ranking of heads against random heads."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastheads.cli.checks import parse_fractions
from fastheads.cli.messages import doing, fail, note
from fastheads.cli.options import Device, Dtype, Mode, ModelName, TrustRemoteCode
from fastheads.errors import AblationFileError, OptionError, ResultsError

if TYPE_CHECKING:
    from fastheads.results.ablation import AblationResult

OUTPUT = Path("ablation.json")
LISTED = 10  # heads at each end of the table of single heads
INTERRUPTED = 130


def ablate(
    *,
    model: ModelName = None,
    profile: Annotated[
        Path, typer.Option(help="The model's profile, from `fastheads profile`.", show_default=False)
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric that ranks the heads: of the profile, or mean_ablation_error_ratio. May be repeated.",
            show_default="head_residual_ratio; with --mode mean mean_ablation_error_ratio",
        ),
    ] = None,
    fractions: Annotated[
        str, typer.Option(metavar="LIST", help="Of the heads: FIRST:LAST:STEP, or numbers with commas.")
    ] = "0.05:0.3:0.05",
    mode: Annotated[
        Mode,
        typer.Option(
            metavar="MODE",
            help="zero: replace heads by zero. mean: by their mean, which the profile must hold (--vectors).",
        ),
    ] = Mode.zero,
    random: Annotated[
        int,
        typer.Option(help="Random draws of as many heads."),
    ] = 20,
    matched: Annotated[
        bool,
        typer.Option(
            "--matched/--no-matched",
            help="Also score as many draws that take as many heads of each layer as the ranking does.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts that the profile has not seen, as for `fastheads profile`. Default: docstrings of Python's standard "
            "library.",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="The field or column that holds the documents.", show_default="text, else messages"
        ),
    ] = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Accept data that the profile has seen, or may have.")
    ] = False,
    sequences: Annotated[int, typer.Option(help="Number of sequences to score.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    each_head: Annotated[bool, typer.Option("--each-head", help="Score each head alone, too.")] = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum tokens in a forward.", show_default="by the device and the vocabulary"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A file for the curve: .png, .pdf or .svg.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of the table.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file for the result (.json).")] = OUTPUT,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ablate the lowest heads of a ranking, and random heads, and print what the model loses.

    The same command continues a run that was interrupted, from OUTPUT.checkpoint. Under torchrun the processes share the work.

    Example: fastheads ablate my-model --profile head_profile.safetensors --fractions 0.1,0.2 --plot ablation.png
    """
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    checkpoint: Path | None = Path(f"{output}.checkpoint")
    with doing("starting", terminal) if terminal.is_terminal else nullcontext():
        from fastheads.corpus import opening, sources
        from fastheads.corpus.filesets import files_source
        from fastheads.errors import AblationInterrupted
        from fastheads.results.head_profile import HeadProfile
        from fastheads.run import loading
        from fastheads.run.ablation import ablation
        from fastheads.run.ablation_inputs import check_options
        from fastheads.run.job import Job

        chosen = parse_fractions(fractions)
        check_options(
            fractions=chosen,
            draws=random,
            seed=seed,
            sequences=sequences,
            seq_len=seq_len,
            batch_tokens=batch_tokens,
        )
        if dtype not in loading.DTYPES:
            raise OptionError(f"unknown dtype {dtype!r}: choose one of {', '.join(loading.DTYPES)}")
        job = Job(1, device)
        first = job.place.rank == 0
        if first:
            _check_files(output, plot, checkpoint)
        measured = HeadProfile.load(profile)
        if mode == "mean" and measured.vectors is None:
            raise ResultsError(f"{profile} has no mean vectors: profile with --vectors")
        for name in metric or []:
            if name != "mean_ablation_error_ratio":
                measured.statistics(name)  # raises if there is none
        names = data or []
        if "" in names:  # from an unset variable, say
            raise OptionError("--data is empty: name a file, or leave out --data")
        alone = next((name for name in names if name == "-" or sources.is_hub_name(name)), None)
        if alone is not None and len(names) > 1:
            raise OptionError(f"--data {alone} must be the only --data")
        if alone == "-":
            if job.place.world > 1:
                raise OptionError(
                    "--data -: several processes cannot share standard input: save it to a file"
                )
            checkpoint = None
        if alone is not None:
            text = opening.open_source(alone, field=field)
        elif names:
            text = files_source(names, field, "auto")
        else:
            sources.refuse_field_options("the text of Python", field, "auto")
            text = None
        found = loading.find_model(model)
    try:
        with job:
            with doing(f"loading {found.name}", terminal) if first else nullcontext():
                loaded, tokenizer = loading.load(
                    found, dtype=dtype, device=job.device, trust_remote_code=trust_remote_code
                )
            if first:
                if not names:
                    note(
                        "no --data: using docstrings of Python's standard library, which the profile has not seen"
                    )
                if output.exists() and checkpoint is not None and not checkpoint.exists():
                    note(f"{output} exists: it is replaced")
            with _progress(terminal, shown=first) as progress:
                result = ablation(
                    loaded,
                    measured,
                    text,
                    tokenizer=tokenizer,
                    metrics=metric,
                    fractions=chosen,
                    mode=mode.value,
                    draws=random,
                    seed=seed,
                    matched=matched,
                    sequences=sequences,
                    seq_len=seq_len,
                    each_head=each_head,
                    allow_seen=allow_seen,
                    batch_tokens=batch_tokens,
                    output=output,
                    checkpoint=checkpoint,
                    job=job,
                    progress=progress,
                    say=note if first else lambda line: None,
                    name=found.name,
                )
    except AblationInterrupted as stopped:
        what = "interrupted" if stopped.number == signal.SIGINT else "ended by SIGTERM"
        code = INTERRUPTED if stopped.number == signal.SIGINT else 128 + stopped.number
        resume = "" if stopped.checkpoint is None else "; the same command continues"
        if stopped.result is None:
            raise typer.Exit(
                fail(f"{what} before all sets were scored on a sequence{resume}", code)
            ) from None
        show(stopped.result, as_json=as_json)
        kept = f"the results on {stopped.result.sequences} sequences are saved in {output}"
        raise typer.Exit(fail(f"{what}: {kept}{resume}", code)) from None
    if not first:
        return
    if plot is not None:
        from fastheads.results.ablation_plot import save_plot

        save_plot(result, plot)
    show(result, as_json=as_json)
    if not as_json:
        typer.echo(f"\nsaved {output}")
        if plot is not None:
            typer.echo(f"drawn {plot}")


def _check_files(output: Path, plot: Path | None, checkpoint: Path | None) -> None:
    """Raise now if writing the results would fail, or would overwrite another kind of file."""
    from fastheads.results.ablation import AblationResult
    from fastheads.results.files import check_writable
    from fastheads.results.plots import check_installed, picture_format

    if output.suffix != ".json":
        raise OptionError(f"the output's name must end in .json, not {output.name!r}")
    check_writable(output)
    if checkpoint is not None:
        check_writable(checkpoint)
    if output.exists():
        try:
            AblationResult.load(output)
        except AblationFileError as error:
            raise AblationFileError(
                f"{output} exists and is no ablation result: it is not overwritten, choose another name"
            ) from error
    if plot is not None:
        check_installed()
        picture_format(plot)
        check_writable(plot)


@contextmanager
def _progress(terminal: Console, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows how far the run is: a bar on a terminal, else a line a minute."""
    if not shown:
        yield None
        return
    from fastheads.run.terminal import evaluations_bar

    with evaluations_bar(terminal) as report:
        yield report


def show(result: "AblationResult", *, as_json: bool = False, console: Any = None) -> None:
    """Print the result on stdout: as JSON, or as tables."""
    if as_json:
        typer.echo(result.to_json())
        return
    from fastheads.run.ablation_tables import show as show_tables

    show_tables(result, console or Console(highlight=False), listed=LISTED)
