"""Parse and check options of the command line before a model is loaded."""

from pathlib import Path

from fastheads.errors import OptionError, ProfileFileError


def parse_layers(text: str | None) -> list[int] | None:
    """Parse a list of layers such as 0-3,8; None stays None."""
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


def parse_metrics(text: str | None) -> list[str] | None:
    """Parse a list of metrics such as head_output_norm,head_residual_ratio; None stays None."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise OptionError(f"--metrics {text!r}: expected names with commas between them")
    return names


def parse_fractions(text: str) -> list[float]:
    """Parse fractions such as 0.05:0.3:0.05 (first, last, step) or 0.1,0.2."""
    wrong = OptionError(
        f"--fractions {text!r}: expected FIRST:LAST:STEP or numbers with commas, as in 0.05:0.3:0.05 or 0.1,0.2"
    )
    try:
        numbers = [float(part) for part in text.replace(":", ",").split(",")]
    except ValueError:
        raise wrong from None
    if ":" not in text:
        return numbers
    if (
        text.count(":") != 2
        or "," in text
        or not all(0 < number <= 1 for number in numbers)
        or numbers[0] > numbers[1]
    ):
        raise wrong
    first, last, step = numbers
    return [round(first + n * step, 6) for n in range(int((last - first) / step + 1 + 1e-6))]


def parse_shard(text: str | None) -> tuple[int, int]:
    """Parse a shard such as 1/4 to (0, 4); None is (0, 1)."""
    if text is None:
        return 0, 1
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise OptionError(f"--shard {text!r}: expected I/N with I from 1 to N, as in 1/4")
    return int(number) - 1, int(parts)


def parse_window(text: str | None) -> tuple[int, int] | None:
    """Parse a sink and a window such as 4,256; None stays None."""
    if text is None:
        return None
    sink, _, window = (part.strip() for part in text.partition(","))
    if not (sink.isdecimal() and window.isdecimal()):
        raise OptionError(f"--streaming-error {text!r}: expected SINK,WINDOW, as in 4,256")
    return int(sink), int(window)


def check_options(
    *,
    backend: str,
    precision: str,
    dtype: str,
    seq_len: int | None,
    batch_size: int | None,
    batch_tokens: int | None,
    max_tokens: int | None,
    skip_first: int,
    metrics: list[str] | None,
    streaming: tuple[int, int] | None,
    until_stable: bool,
    checkpoint_every: float,
) -> None:
    """Raise OptionError or BackendError for options that would otherwise fail only after the model is loaded."""
    from fastheads.backends.registry import check_backend
    from fastheads.corpus.sources import check_lengths
    from fastheads.run.api import check_options as check_options_of_a_run
    from fastheads.run.loading import DTYPES
    from fastheads.run.stability import check_ranked
    from fastheads.stats.options import MeasureOptions

    check_backend(backend)
    if skip_first < 0:
        raise OptionError(f"skip_first must be 0 tokens or more, not {skip_first}")
    options = MeasureOptions.of(
        precision=precision, skip_first=skip_first, metrics=metrics, streaming=streaming
    )
    if until_stable:
        check_ranked(options)
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    check_lengths(1 if seq_len is None else seq_len, max_tokens)
    check_options_of_a_run(batch_size, batch_tokens, checkpoint_every, (0, 1))


def check_files(output: Path, plot: Path | None, checkpoint: Path | None = None) -> None:
    """Raise now if writing the results would fail, or would overwrite another kind of file."""
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
                f"{output} exists and is no head profile: it is not overwritten, choose another name"
            ) from error
    if plot is not None:
        check_installed()
        picture_format(plot)
        check_writable(plot)


def check_mode(mode: str, metric: str | None, model: str | None) -> None:
    """Raise OptionError unless --metric and --model fit --mode."""
    if mode == "zero" and model is not None:
        raise OptionError("--model is for --mode mean")
    if mode == "mean" and model is None:
        raise OptionError("--mode mean needs --model, the model that was profiled")
    if mode == "mean" and metric is not None:
        raise OptionError("--mode mean ranks by the error of mean ablation: leave out --metric")


def check_stdin(resume: bool, processes: int) -> None:
    """Raise OptionError for options that standard input does not support."""
    if resume:
        raise OptionError(
            "--resume: standard input cannot be resumed, since it cannot be read again: save it to a file"
        )
    if processes > 1:
        raise OptionError("--data -: several processes cannot share standard input: save it to a file")
