"""The command line: `fastheads profile`, `show`, `report`, `merge`, `ablate`, `prune`, `kv` and `doctor`.

Results go to stdout; progress and errors go to stderr, an error as one line. The heavy libraries are imported
when a command runs, so that `--help` is quick.
"""

import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from fastheads._version import __version__
from fastheads.cli.ablate import ablate
from fastheads.cli.checks import check_files as _check_files
from fastheads.cli.checks import check_options as _check_options
from fastheads.cli.checks import check_stdin, parse_layers, parse_metrics, parse_shard, parse_window
from fastheads.cli.kv import EXAMPLE as KV_EXAMPLE
from fastheads.cli.kv import kv
from fastheads.cli.messages import doing, fail, message, note, show_warning, tell_of_replaced
from fastheads.cli.options import (
    Backend,
    Cut,
    Device,
    Dtype,
    Include,
    Metrics,
    ModelName,
    TokenAgg,
    TrustRemoteCode,
    number_or_all,
)
from fastheads.cli.prune import EXAMPLE as PRUNE_EXAMPLE
from fastheads.cli.prune import prune
from fastheads.cli.report import report
from fastheads.cli.show import show, show_profile
from fastheads.errors import OptionError

if TYPE_CHECKING:
    from fastheads.results.head_profile import HeadProfile

DEMO_TOKENS = 32_768  # of the default text: a minute or so for a small model on two cores
OUTPUT = Path("head_profile.safetensors")
ERROR, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Profile every attention head of a transformer while it runs.",
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            command = typer.main.get_command(app)
            code = command.main(arguments or ["--help"], prog_name="fastheads", standalone_mode=False)
        except KeyboardInterrupt:
            code = fail("interrupted", INTERRUPTED)
        except OptionError as error:
            code = fail(message(error), USAGE)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            code = fail(message(error), ERROR)
        except Exception as error:
            # Errors of the parser, click or typer's copy of it; anything else is a bug, shown with its traceback.
            if not hasattr(error, "format_message"):
                raise
            code = fail(error.format_message(), USAGE)
    raise SystemExit(code or 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastheads {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Profile every attention head of a transformer while it runs."""


@app.command()
def profile(
    context: typer.Context,
    *,
    model: ModelName = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, JSON lines (.jsonl, .ndjson, .json), CSV, TSV or Parquet; a folder of them, or a pattern such as "
            "'data/*.jsonl'; - for standard input; or a data set of the Hub, owner/name. Repeat it for several files. "
            "Default: the English text that comes with Python (pydoc_data.topics).",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            help="The field or column that holds the documents.",
            show_default="text, else messages or conversations",
        ),
    ] = None,
    cut: Annotated[
        Cut | None,
        typer.Option(
            metavar="CUT",
            help="documents: each is one sequence, or several if longer than --seq-len. stream: blocks of --seq-len tokens "
            "across documents, without padding.",
            show_default="stream for a text file, else documents",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Treat the documents as chats, with the tokenizer's chat template, or as texts.",
            show_default="detected",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a data set of the Hub.")] = "train",
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Stream a data set of the Hub instead of downloading it first."),
    ] = False,
    token_agg: Annotated[
        TokenAgg,
        typer.Option(
            metavar="AGG",
            help="What one sample is. last: a sequence's last token; all: the mean over its tokens; token: each token.",
        ),
    ] = TokenAgg.all,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens in a sequence.", show_default="512, or the model's limit if that is less"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Maximum sequences in a forward.", show_default="as --batch-tokens allows"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens in a forward, padding included. Halved if memory runs out.",
            show_default="by the GPU's free memory, 2048 on the CPU",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=number_or_all,
            metavar="N|all",
            help="Stop after this many tokens; all: use all data.",
            show_default=f"all; {DEMO_TOKENS} without --data and --until-stable",
        ),
    ] = None,
    skip_first: Annotated[int, typer.Option(help="Leave out the first N tokens of each sequence.")] = 0,
    layers: Annotated[
        str | None, typer.Option(help="Profile only these layers, as in 0-3,8.", show_default="all")
    ] = None,
    include: Include = None,
    metrics: Metrics = None,
    kv_groups: Annotated[
        bool,
        typer.Option(
            "--kv-groups", help="Also measure the summed contributions of heads that share keys and values."
        ),
    ] = False,
    vectors: Annotated[
        bool,
        typer.Option(
            "--vectors", help="Also measure each head's mean output, for mean ablation and projections."
        ),
    ] = False,
    streaming_error: Annotated[
        str | None,
        typer.Option(
            metavar="SINK,WINDOW",
            help="Also measure what is lost if heads see only the first SINK tokens and the last WINDOW, in sequences that are "
            "longer: see `fastheads kv`.",
            show_default=False,
        ),
    ] = None,
    backend: Backend = "auto",
    precision: Annotated[str, typer.Option(help="exact or fast.")] = "exact",
    dtype: Dtype = "auto",
    device: Device = "auto",
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable",
            help="Stop once the ranking of heads by their default metric has settled, by confidence sequences over the "
            "sequences. Not with --token-agg token.",
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the decoder through torch.compile.")
    ] = False,
    tp: Annotated[
        int, typer.Option(help="Under torchrun: N processes share one model (tensor parallelism).")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: run the I-th of N parts of the data; `fastheads merge` merges their files.",
            show_default="all data",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run that left OUTPUT.checkpoint; without one start from the beginning, unless OUTPUT exists.",
        ),
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints, which are written to OUTPUT.checkpoint.")
    ] = 30.0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file for the profile (.safetensors).")
    ] = OUTPUT,
    plot: Annotated[
        Path | None,
        typer.Option(help="A file for a heatmap: .png, .pdf or .svg.", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a model over text and measure every attention head.

    Under torchrun the processes split the data between them: torchrun --nproc-per-node 2 -m fastheads profile ...
    """
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    checkpoint: Path | None = Path(f"{output}.checkpoint")
    try:
        # Only on a terminal: elsewhere a wrong option would print two lines instead of one.
        with doing("starting", terminal) if terminal.is_terminal else nullcontext():
            from fastheads.corpus import opening, sources
            from fastheads.corpus.filesets import files_source
            from fastheads.results.locks import locked
            from fastheads.run import loading
            from fastheads.run.job import Job
            from fastheads.stats.confidence import check_token_agg

            limited = not (data or until_stable or _is_given(context, "max_tokens"))
            if limited:
                max_tokens = DEMO_TOKENS
            if until_stable:
                check_token_agg(str(token_agg))
            chosen_layers = parse_layers(layers)
            chosen_metrics = parse_metrics(metrics)
            part = parse_shard(shard)
            sizes = parse_window(streaming_error)
            if sizes is not None and compile:
                raise OptionError(
                    "--streaming-error cannot be measured in compiled code: leave out --compile"
                )
            _check_options(
                backend=backend,
                precision=precision,
                dtype=dtype,
                seq_len=seq_len,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                max_tokens=max_tokens,
                skip_first=skip_first,
                metrics=chosen_metrics,
                streaming=sizes,
                until_stable=until_stable,
                checkpoint_every=checkpoint_every,
            )
            job = Job(tp, device)
            first = job.place.rank == 0
            if first:  # only the first process writes files
                _check_files(output, plot, checkpoint)
            names = data or []
            if "" in names:  # from an unset variable, say
                raise OptionError("--data is empty: name a file, or leave out --data")
            kind: bool | Literal["auto"] = "auto" if chat is None else chat
            of_hub = any(map(sources.is_hub_name, names))
            for option in () if of_hub else ("split", "streaming"):
                if _is_given(context, option):
                    raise OptionError(f"--{option} is for data sets of the Hub, owner/name")
            alone = next((name for name in names if name == "-" or sources.is_hub_name(name)), None)
            if alone is not None and len(names) > 1:
                raise OptionError(f"--data {alone} must be the only --data: profile it by itself, and merge")
            if alone == "-":
                check_stdin(resume, job.place.world)
                checkpoint = None
            if alone is not None or not names:
                text = opening.open_source(alone, field=field, chat=kind, split=split, streaming=streaming)
            else:
                text = files_source(names, field, kind)
            found = loading.find_model(model)
        with job, locked(output) if first else nullcontext():
            with doing(f"loading {found.name}", terminal) if first else nullcontext():
                loaded, tokenizer = loading.load(
                    found,
                    dtype=dtype,
                    device=job.device,
                    trust_remote_code=trust_remote_code,
                    mesh=job.mesh,
                )
            if first:
                if limited:
                    note(
                        f"no --data: using the first {DEMO_TOKENS:,} tokens of Python's own English text (--max-tokens all: "
                        "all of it)"
                    )
                if checkpoint is None:
                    note("standard input cannot be resumed: no checkpoints are written")
                elif not resume:
                    tell_of_replaced(output, checkpoint)
            result, interrupted = _measure(
                model=loaded,
                name=found.name,
                data=text,
                tokenizer=tokenizer,
                token_agg=str(token_agg),
                seq_len=seq_len,
                cut=None if cut is None else str(cut),
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                max_tokens=max_tokens,
                layers=chosen_layers,
                kv_groups=kv_groups,
                vectors=vectors,
                streaming=sizes,
                metrics=chosen_metrics,
                include=include or (),
                backend=backend,
                precision=precision,
                skip_first=skip_first,
                until_stable=until_stable,
                compile=compile,
                output=output,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
                shard=part,
                job=job,
            )
    except KeyboardInterrupt:
        what = "interrupted before anything was measured; nothing is saved"
        # A second Ctrl-C while handling the first, or while resuming an earlier run.
        if checkpoint is not None and checkpoint.exists():
            what = f"interrupted; --resume continues from {checkpoint}"
        raise typer.Exit(fail(what, INTERRUPTED)) from None
    if not first:
        return
    try:
        if plot is not None:
            from fastheads.results.plots import save_heatmap

            save_heatmap(result, plot)
        show_profile(result)
        typer.echo(f"\nsaved {output}; see it again with: fastheads show {output}")
        if plot is not None:
            typer.echo(f"drawn {plot}")
    except KeyboardInterrupt:
        interrupted = interrupted or (f"interrupted; the profile is saved in {output}", INTERRUPTED)
    if interrupted is not None:
        raise typer.Exit(fail(*interrupted))


app.command(epilog=PRUNE_EXAMPLE)(prune)
app.command()(show)
app.command()(report)


@app.command()
def merge(
    files: Annotated[
        list[Path],
        typer.Argument(help="Two or more profiles that `fastheads profile` wrote.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file for the merged profile.", show_default=False)
    ],
    allow_repeated: Annotated[
        bool,
        typer.Option(
            "--allow-repeated", help="Accept profiles of the same data, whose samples then count twice."
        ),
    ] = False,
) -> None:
    """Merge profiles of one model, as if one run had gone over all their data.

    Profiles of another model, other weights, another aggregation or other metrics are refused, and so are profiles of the same
    data.
    """
    if len(files) < 2:
        raise OptionError("merge needs two or more files")
    from fastheads.results.head_profile import HeadProfile

    _check_files(output, None)
    profiles = [HeadProfile.load(file) for file in files]
    merged = HeadProfile.merge(profiles, names=[str(file) for file in files], allow_repeated=allow_repeated)
    tell_of_replaced(output)
    merged.save(output)
    show_profile(merged)
    typer.echo(f"\nmerged {len(files)} profiles into {output}; see it again with: fastheads show {output}")


app.command()(ablate)


@app.command()
def doctor(
    *,
    model: Annotated[
        str, typer.Argument(help="A local folder, a GGUF file or a Hub id.", show_default=False)
    ],
    include: Include = None,
    backend: Backend = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which modules of a model would be profiled, and how, and check them on one batch."""
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    with doing(f"loading {model}", terminal):
        from fastheads.backends.registry import check_backend
        from fastheads.cli.doctor import diagnose, show
        from fastheads.run import loading

        check_backend(backend)
        loaded = loading.load_model(
            loading.find_model(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    found, problem = diagnose(loaded, include=include or (), backend=backend)
    show(loaded, found, Console(highlight=False))
    if problem is not None:
        raise typer.Exit(fail(message(problem), ERROR))
    typer.echo(f"\nall is well; profile it with: fastheads profile {model}")


app.command(epilog=KV_EXAMPLE)(kv)


def _measure(**arguments: Any) -> tuple["HeadProfile", tuple[str, int] | None]:
    """Run `profile(**arguments)` with a progress bar; after a signal also return a message and the exit status."""
    from fastheads.errors import ProfileInterrupted
    from fastheads.run.api import profile

    try:
        return profile(**arguments, progress=True), None
    except ProfileInterrupted as stopped:
        place, output = arguments["job"].place, arguments["output"]
        code = INTERRUPTED if stopped.number == signal.SIGINT else 128 + stopped.number
        what = "interrupted" if stopped.number == signal.SIGINT else "ended by SIGTERM"
        resume = f"; --resume continues from {stopped.checkpoint}" if stopped.checkpoint is not None else ""
        if place.world > 1:
            why = "" if stopped.number == signal.SIGINT else " (torchrun ends all ranks when one has ended)"
            raise typer.Exit(fail(f"rank {place.rank}: {what}{why}{resume}", code)) from None
        tokens = stopped.profile.metadata["data"]["tokens"]
        if not tokens:
            if stopped.checkpoint is not None and not arguments["resume"]:
                stopped.checkpoint.unlink(missing_ok=True)
            raise KeyboardInterrupt from None
        stopped.profile.save(output)
        return stopped.profile, (
            f"{what}: the results of {tokens:,} tokens are saved in {output}{resume}",
            code,
        )


def _is_given(context: typer.Context, option: str) -> bool:
    """True if the option was given, rather than left at its default."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"
