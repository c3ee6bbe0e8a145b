"""`fastheads kv`: which KV groups need the long context, in one command."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fastheads.cli.messages import doing, note
from fastheads.cli.options import By, Device, Dtype, Heads, ModelName, TrustRemoteCode
from fastheads.errors import OptionError

if TYPE_CHECKING:
    from fastheads.intervene.kv_map import KvMap
    from fastheads.results.head_profile import HeadProfile
    from fastheads.run.kv import Evaluation

SINK, WINDOW, SEQ_LEN = 4, 256, 4096
SEQUENCES, HELD_OUT, DRAWS, LISTED = 8, 8, 20, 10
EXAMPLE = (
    "Example: fastheads kv my-llama --data books.txt --keep 0.5 --evaluate -o map.json -o duo/ -o map.png"
)


def kv(
    *,
    model: ModelName = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Long texts: a text file, JSON lines, CSV, TSV or Parquet, or a data set of the Hub, owner/name. Default: the "
            "English text that comes with Python (pydoc_data.topics).",
            show_default=False,
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="The field or column that holds the documents.", show_default=False)
    ] = None,
    sink: Annotated[
        int | None, typer.Option(help="Tokens at the start of a sequence.", show_default=str(SINK))
    ] = None,
    window: Annotated[int | None, typer.Option(help="The last tokens.", show_default=str(WINDOW))] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a sequence.", show_default=f"{SEQ_LEN}, or the model's limit if that is less"
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure.")] = SEQUENCES,
    keep: Annotated[
        float | None,
        typer.Option(help="The share of the KV groups that keeps the full cache.", show_default="0.5"),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Instead of --keep: groups with a greater error keep the full cache.", show_default=False
        ),
    ] = None,
    by: Annotated[
        By,
        typer.Option(
            metavar="BY", help="rms or mean: of the errors of tokens. rms weighs rare large ones more."
        ),
    ] = By.rms,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="A profile made with `fastheads profile --streaming-error` (which resumes, and runs under torchrun), instead of "
            "measuring here.",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Let the groups stream in the model's forward, on other texts, against random draws and attention mass.",
        ),
    ] = False,
    curve: Annotated[bool, typer.Option("--curve", help="As --evaluate, at several shares.")] = False,
    held_out: Annotated[int, typer.Option(help="Sequences to evaluate on.")] = HELD_OUT,
    draws: Annotated[int, typer.Option(help="Random draws, with as many groups of each layer.")] = DRAWS,
    heads: Heads = LISTED,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="MAP.json: the map. A folder: the map for DuoAttention (full_attention_heads.tsv, config.json). .png, .pdf or "
            ".svg: a heatmap. .safetensors: the profile. May be repeated.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the map and the evaluation as JSON.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find which KV groups need the long context, and which only the first tokens and the last ones.

    Measures what the residual stream loses where a KV group sees only --sink and --window tokens; the groups that lose most keep
    the full cache.
    """
    outputs = _checked_outputs(output or [])
    if keep is not None and max_error is not None:
        raise OptionError("give --keep or --max-error, not both")
    for name, value, least in (
        ("--sequences", sequences, 1),
        ("--held-out", held_out, 1),
        ("--draws", draws, 0),
        ("--heads", 1 if heads is None else heads, 1),
    ):
        if value < least:
            raise OptionError(f"{name} must be at least {least}, not {value}")
    terminal = Console(stderr=True, file=sys.stderr, highlight=False)
    with doing("starting", terminal):
        from fastheads.backends.streaming_attention import Window
        from fastheads.corpus import opening
        from fastheads.corpus.windows import Corpus
        from fastheads.intervene.kv_map import check_share
        from fastheads.results.head_profile import HeadProfile
        from fastheads.run import kv as job
        from fastheads.run import loading

        keep = 0.5 if keep is None and max_error is None else keep
        if keep is not None:
            check_share(keep)
        measured = None if profile is None else HeadProfile.load(profile)
        limits = Window(*_sizes(measured, sink, window))
        found = None
        if measured is not None:
            found = job.map_of(
                measured, keep=keep, bound=max_error, by=by.value, sink=limits.sink, window=limits.window
            )
        evaluate = evaluate or curve
        loaded = tokenizer = texts = None
        if measured is None or evaluate:
            source = opening.open_source(data, field=field)
            if source is None:
                raise OptionError(f"--data {data} holds no texts")
            named = loading.find_model(model)
    if measured is None or evaluate:
        with doing(f"loading {named.name}", terminal):
            loaded, tokenizer = loading.load(
                named, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            length = _fitting(loaded, seq_len)
            assert source is not None
            job.check_length(length, sink=limits.sink, window=limits.window)
            corpus = Corpus(source, tokenizer, cut="stream", seq_len=length)
            count = (0 if measured is not None else sequences) + (held_out if evaluate else 0)
            texts = job.long_sequences(corpus, count)
            if found is not None:
                found.check_model(loaded)
    if measured is None:
        assert loaded is not None and texts is not None
        note(f"measuring {sequences} sequences of {texts.shape[1]:,} tokens")
        measured = job.profile_streaming(
            loaded, texts[:sequences], sink=limits.sink, window=limits.window, progress=True, name=named.name
        )
        found = job.map_of(
            measured, keep=keep, bound=max_error, by=by.value, sink=limits.sink, window=limits.window
        )
    assert found is not None
    result = None
    if evaluate:
        assert loaded is not None and texts is not None
        result = job.evaluate(
            loaded,
            found,
            texts[-held_out:],
            ranked_by=None if profile is not None else texts[:sequences],
            draws=draws,
            shares=job.SHARES if curve else (),
            say=note,
        )
    _write(outputs, found, measured)
    if as_json:
        document = json.loads(found.to_json())
        if result is not None:
            document["evaluation"] = result.to_json()
        typer.echo(json.dumps(document, indent=1))
        return
    _show(found, measured, result, heads)
    for path in outputs:
        typer.echo(f"wrote {path}")


def _checked_outputs(paths: list[Path]) -> list[Path]:
    """Return the paths, checked before anything is measured."""
    from fastheads.cli.checks import check_files
    from fastheads.results.files import check_writable
    from fastheads.results.plots import SUFFIXES, check_installed

    for path in paths:
        if path.suffix in SUFFIXES:
            check_installed()
        if path.suffix == ".safetensors":
            check_files(path, None)
        elif path.suffix in (".json", *SUFFIXES):
            check_writable(path)
        elif path.suffix:
            raise OptionError(
                f"--output {path}: its name must end in .json, .safetensors, {', '.join(SUFFIXES)}, or be a folder's"
            )
        else:
            check_writable(path / "config.json")
    return paths


def _sizes(measured: "HeadProfile | None", sink: int | None, window: int | None) -> tuple[int, int]:
    """Return the sink and window: as given, else those of the profile, else the defaults."""
    known: Any = {} if measured is None else measured.metadata.get("streaming")
    known = known if isinstance(known, dict) else {}
    return (
        known.get("sink", SINK) if sink is None else sink,
        known.get("window", WINDOW) if window is None else window,
    )


def _fitting(model: Any, seq_len: int | None) -> int:
    """Return the length of sequences that the model can have."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None) or SEQ_LEN
    if seq_len is None:
        return min(SEQ_LEN, limit)
    if seq_len > limit:
        raise OptionError(f"--seq-len {seq_len} is more than the model's max_position_embeddings, {limit}")
    return seq_len


def _write(paths: list[Path], found: "KvMap", measured: "HeadProfile") -> None:
    from fastheads.results.plots import save_heatmap
    from fastheads.stats.names import KV_STREAMING_METRIC

    for path in paths:
        if path.suffix == ".json":
            found.save(path)
        elif path.suffix == ".safetensors":
            measured.save(path)
        elif path.suffix:
            save_heatmap(measured, path, KV_STREAMING_METRIC)
        else:
            found.save_duo(path)


def _show(found: "KvMap", measured: "HeadProfile", result: "Evaluation | None", listed: int | None) -> None:
    from fastheads.run.kv_terminal import show

    show(found, measured, result, Console(highlight=False), listed)
