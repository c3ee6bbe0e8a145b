"""Corpora: every kind of source, both cuts, windows from any point; the oracle is plain code with the tokenizer."""

import contextlib
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from checkpoints import ascii_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from word_tokenizers import WORDS, chat_tokenizer, special_tokenizer

from fastheads.corpus import hf_datasets as tables
from fastheads.corpus import identity, readers, token_batches
from fastheads.corpus import sources as data
from fastheads.corpus import windows as corpora
from fastheads.corpus.identity import tokenizer_fingerprint
from fastheads.corpus.opening import open_source
from fastheads.corpus.token_batches import plan
from fastheads.corpus.windows import Corpus, Window
from fastheads.errors import DataError, MissingExtraError, OptionError


def some_texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(count)]


TEXTS = some_texts(60)


def corpus(source, tokenizer=None, *, seq_len=8, window_characters=300, **options) -> Corpus:
    source = source if isinstance(source, data.Source) else open_source(source)
    return Corpus(
        source,
        tokenizer or special_tokenizer(),
        seq_len=seq_len,
        window_characters=window_characters,
        **options,
    )


def ids(window: Window) -> list[list[int]]:
    assert all(sequence.dtype == torch.int32 for sequence in window.sequences)
    return [sequence.tolist() for sequence in window.sequences]


def all_ids(windows) -> list[list[int]]:
    return [sequence for window in windows for sequence in ids(window)]


def split(tokens: list[int], seq_len: int = 8) -> list[list[int]]:
    return [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]


def as_documents(texts, tokenizer, seq_len: int = 8) -> list[list[int]]:
    return [block for text in texts if text for block in split(tokenizer(text)["input_ids"], seq_len)]


def as_stream(texts, tokenizer, seq_len: int = 8) -> list[list[int]]:
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return split([t for text in texts if text for t in tokenizer(text)["input_ids"] + eos], seq_len)


ORACLES = {"documents": as_documents, "stream": as_stream}
CUTS = pytest.mark.parametrize("cut", ["documents", "stream"])


# Sources


@pytest.fixture
def write(tmp_path):
    """Writes a file of the kind that its name says, with a row for each text."""

    def write(name: str, texts=TEXTS, field: str = "text"):
        path = tmp_path / name
        kind = name.split(".")[1]
        rows = [{"id": number, field: text} for number, text in enumerate(texts)]
        if kind in ("csv", "tsv"):
            import pandas

            # compressed as the name says
            pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        return path

    return write


FILES = ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.csv.bz2", "a.tsv.xz"]


@CUTS
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_and_resumes_anywhere(write, name, cut):
    tokenizer = special_tokenizer()
    found = corpus(write(name), tokenizer, cut=cut)
    windows = list(found.windows())
    assert len(windows) > 10
    assert all_ids(windows) == ORACLES[cut](TEXTS, tokenizer)
    assert_resumes(found, windows)


@CUTS
@pytest.mark.parametrize("source", ["list", "lines", "dataset", "stream of a dataset"])
def test_what_is_in_memory_resumes_anywhere(tmp_path, source, cut):
    tokenizer = special_tokenizer()
    if source == "list":
        given = TEXTS
    elif source == "lines":
        given = tmp_path / "a.txt"
        given.write_text("\n".join(TEXTS))
        if cut == "stream":
            given = TEXTS
    else:
        given = datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))})
        if "stream" in source:
            given = given.to_iterable_dataset(num_shards=3)
    found = corpus(given, tokenizer, cut=cut)
    windows = list(found.windows())
    assert all_ids(windows) == ORACLES[cut](TEXTS, tokenizer)
    assert_resumes(found, windows)


@pytest.mark.parametrize("chain", ["shuffled", "shuffled_and_mapped", "interleaved", "mapped"])
def test_a_stream_resumes_without_a_loss_whatever_it_went_through(chain):
    """`datasets` does not keep what is in a shuffle buffer with a position."""
    stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3)
    shuffled = stream.shuffle(seed=1, buffer_size=5)
    made = {
        "shuffled": lambda: shuffled,
        "shuffled_and_mapped": lambda: shuffled.map(lambda row: row).filter(
            lambda row: len(row["text"]) != 11
        ),
        "interleaved": lambda: datasets.interleave_datasets([stream, shuffled], seed=2),
        "mapped": lambda: stream.map(lambda rows: rows, batched=True, batch_size=7),
    }
    found = corpus(made[chain]())
    windows = list(found.windows())
    assert len(windows) > 3
    assert_resumes(found, windows)


def test_a_text_file_is_one_stream_and_resumes_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 64)
    tokenizer = special_tokenizer()
    text = "\ufeff" + "\n\n".join(TEXTS) + "\n" + "one " * 100 + "zwölf"
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = corpus(path, tokenizer)
    windows = list(found.windows())
    assert all_ids(windows) == split(tokenizer(text[1:])["input_ids"])  # one BOS, no EOS
    assert_resumes(found, windows)


@pytest.mark.parametrize("pattern", [
    None,  # as GPT-2
    # as Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
])  # fmt: skip
def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(pattern, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2**12)
    source = data.default_text()
    text = "".join(source.items())
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text[:50_000]], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = chain.from_iterable(
        all_ids(corpus(source, tokenizer, seq_len=512, window_characters=2**16).windows())
    )
    assert list(found) == tokenizer(text, verbose=False)["input_ids"]


def facts(window: Window) -> tuple:
    """All that is noted of a window, but for how `datasets` writes a position."""
    records = [
        record | {"position": (record["position"] or {}).get("row", record["position"])}
        for record in (window.resume, window.after)
    ]
    return window.index, records, window.documents, window.characters


def assert_resumes(found: Corpus, windows: list[Window]) -> None:
    """From each window's record, by way of JSON, come the rest of the windows, and the same records."""
    every = max(1, len(windows) // 6)
    for window in windows[::every]:
        rest = list(found.windows(json.loads(json.dumps(window.resume))))
        assert [w.index for w in rest] == [w.index for w in windows if w.index >= window.index]
        expected = [w for w in windows if w.index >= window.index]
        assert list(map(ids, rest)) == list(map(ids, expected))
        assert list(map(facts, rest)) == list(map(facts, expected))
        # `datasets` counts from where it began, so that what a resumed run notes is tried too
        middle = rest[len(rest) // 2]
        again = list(found.windows(json.loads(json.dumps(middle.resume))))
        assert list(map(ids, again)) == list(map(ids, rest[len(rest) // 2 :]))
    for first, second in pairwise(windows):
        if second.index == first.index + 1:
            assert first.after == second.resume
    assert list(found.windows(windows[-1].after)) == []


def test_a_window_that_is_resumed_is_not_read_from_the_start(write):
    path = write("a.jsonl")
    found = corpus(path)
    windows = list(found.windows())
    assert len(windows) > 2
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(windows[-2].after["documents"]):
        lines[number] = b"x" * (len(lines[number]) - 1) + b"\n"
    path.write_bytes(b"".join(lines))
    (again,) = found.windows(windows[-1].resume)
    assert ids(again) == ids(windows[-1])
    with pytest.raises(DataError):
        list(found.windows())


@pytest.mark.parametrize(
    ("name", "says"), [("a.jsonl", "'id', 'body'"), ("a.csv", "'id', 'body'"), ("a.parquet", "'id', 'body'")]
)
def test_the_column_is_chosen_or_the_columns_are_named(write, name, says):
    path = write(name, ["one", "two"], "body")
    with pytest.raises(
        DataError, match=rf"has no field 'text' \(its fields: {says}; field=, or --field, chooses one\)"
    ):
        open_source(path)
    with pytest.raises(DataError, match="has no field 'none'"):
        open_source(path, field="none")
    assert list(open_source(path, field="body").items()) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_cells_are_texts_as_they_stand(write, name):
    texts = ["NA", "null", "007", "1e5", 'a "quote",\nand a line', "", "ü\u2028", "long " * 10**5]
    assert list(open_source(write(name, texts)).items()) == texts


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["one", None], None),
        ([1, 2], None),
        ([b"one"], pyarrow.binary()),
        ([["one"]], None),
        ([{"a": "one"}], None),
        ([None], pyarrow.null()),
    ],
)
def test_columns_that_are_no_texts_are_refused_by_row(tmp_path, values, kind):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row \d: field 'text' is not a text$"):
        list(open_source(path).items())


def damaged(content: bytes) -> bytes:
    return content[:40] + bytes(200) + content[240:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"no parquet at all"),
        ("a.parquet", damaged),
        ("a.csv", b"text\n\xff\xfe\n"),
        ("a.csv", b'text\n"never closed\n' + b"x\n" * 10),
        ("a.csv", b"text,id\none,2,3,4\n" * 3),
        ("a.csv", b"\n\n"),
        ("a.csv", b"text\n"),
        ("a.csv", bytes(100)),
        ("a.jsonl.gz", b"not compressed"),
        ("a.jsonl.gz", gzip.compress(b'{"text": 3}\n{"text": ["x"]}\n', mtime=0)),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 5000, mtime=0)[:-20]),
        ("a.jsonl.gz", gzip.compress(rb'{"text": "\ud800"}', mtime=0)),
    ],
)
def test_damaged_files_are_refused_in_one_line(write, tmp_path, name, content, capfd):
    path = tmp_path / name
    if callable(content):
        content = content(write(name, some_texts(500)).read_bytes())
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(corpus(path).windows())
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and name in message
    assert capfd.readouterr() == ("", "")


def test_an_extension_type_is_not_unpickled(tmp_path):
    """Files of Arrow can name a pickled Python type."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    field = pyarrow.field(
        "text",
        pyarrow.string(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Bomb()),
        },
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(["one"])], schema=pyarrow.schema([field])), path)
    with contextlib.suppress(DataError, Warning):
        list(open_source(path).items())
    assert not (tmp_path / "ran").exists()


def test_other_data_are_told_where_no_hash_of_all_of_it_does(write, monkeypatch):
    """Though they begin alike, the positions of one are refused by the other."""
    monkeypatch.setattr(data, "HASHED_BYTES", 10)
    monkeypatch.setattr(identity, "HEAD_CHARACTERS", 20)
    other = [*TEXTS[:-1], TEXTS[-1][::-1] + "!"]
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet"):
        found = corpus(write(name))
        assert found.identity["sha256"] is None
        resume = next(iter(found.windows())).after
        assert list(corpus(open_source(found.source.name)).windows(resume))
        path = write(name, other)
        os.utime(path, ns=(1, 1))
        changed = corpus(path)
        assert changed.identity["head_sha256"] == found.identity["head_sha256"]
        assert changed.identity["modified_ns"] == 1
        with pytest.raises(DataError, match="another corpus"):
            changed.windows(resume)
    found, same, changed = (
        corpus(datasets.Dataset.from_dict({"text": texts})) for texts in (TEXTS, TEXTS, other)
    )
    resume = next(iter(found.windows())).after
    assert list(same.windows(resume))
    assert changed.identity["head_sha256"] == found.identity["head_sha256"]
    with pytest.raises(DataError, match="another corpus"):
        changed.windows(resume)


def test_names_with_the_signs_of_patterns_are_names(write, tmp_path):
    (tmp_path / "a1.parquet").write_bytes(b"another file")
    assert list(open_source(write("a[1]*?.parquet", ["one"])).items()) == ["one"]


def test_a_name_of_the_hub(write, tmp_path, monkeypatch):
    """The library is asked for the name, the configuration and the split; here it finds a file."""
    asked = []
    load = datasets.load_dataset
    path = write("a.parquet")

    def found(name, configuration=None, **options):
        asked.append((name, configuration, options))
        return load("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", found)
    datasets.disable_progress_bars()
    tokenizer = special_tokenizer()
    for streaming in (False, True):
        source = open_source("an-owner/some_name:part", split="train", streaming=streaming)
        assert asked.pop() == ("an-owner/some_name", "part", {"split": "train", "streaming": streaming})
        assert (source.name, source.sha256) == ("an-owner/some_name:part, split train", None)
        assert ("dataset" in corpus(source, tokenizer).identity) == (not streaming)
        windows = list(corpus(source, tokenizer).windows())
        assert all_ids(windows) == as_documents(TEXTS, tokenizer)
        assert_resumes(corpus(source, tokenizer), windows)
    open_source("owner/name")
    assert asked == [("owner/name", None, {"split": "train", "streaming": False})]


def test_a_data_set_that_cannot_be_had_is_an_error_of_one_line(monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="^cannot read owner/name, split test: no route to the host$"):
        open_source("owner/name", split="test")


@pytest.mark.parametrize(
    "name", ["none", "none.txt", "folder/none.jsonl", "owner/none.parquet", "a b", "../x", "x" * 5000]
)
def test_what_is_neither_a_file_nor_of_the_hub(name):
    with pytest.raises(DataError, match="no data file .*owner/name"):
        open_source(name)


def test_options_that_would_be_passed_over_are_refused():
    for given in ({"field": "text"}, {"chat": True}):
        with pytest.raises(OptionError, match=f"{next(iter(given))} is for .* a list of texts has no fields"):
            open_source(TEXTS, **given)
    assert open_source(TEXTS, chat=False).held == tuple(TEXTS)


def test_what_is_no_source():
    batches = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    assert open_source(batches) is open_source(torch.ones(1, 2)) is open_source(3) is None
    assert open_source(iter(["read once"])) is None


def test_without_datasets_the_extra_is_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"needs datasets: pip install 'fastheads\[corpus\]'"):
        open_source(write("a.parquet", ["one"]))
    with pytest.raises(MissingExtraError, match="the data set owner/name needs datasets"):
        open_source("owner/name")
    for name in ("a.jsonl", "a.csv"):
        assert all_ids(corpus(write(name, ["one"])).windows()) == [[1, 3]]


@pytest.mark.parametrize("version", ["3.6.0", "4.0.0", "4.8.4", "5.0.0"])
def test_releases_of_datasets_that_lose_their_place_are_refused_by_name(write, monkeypatch, version):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    path = write("a.parquet", ["one"])
    monkeypatch.setattr(datasets, "__version__", version)
    for given in (path, "owner/name", dataset.to_iterable_dataset()):
        with pytest.raises(
            MissingExtraError, match=rf"needs datasets 5\.0\.1 or later \({version} is"
        ) as error:
            open_source(given)
        assert "pip install 'fastheads[corpus]'" in str(error.value)
    assert open_source(dataset) is not None  # has no place to lose
    for sound in ("5.0.1", "5.2.0", "6.0.0"):
        monkeypatch.setattr(datasets, "__version__", sound)
        assert open_source(path) is not None


def test_the_oldest_datasets_is_that_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.findall(r"datasets>=([\d.]+)", project) == [tables.OLDEST] * 2


# Chats

CHATS = [[{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]] * 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_chats_go_through_the_template_and_get_no_second_bos(write, name, field, workers):
    found = corpus(write(name, CHATS, field), chat_tokenizer(), workers=workers, seq_len=100)
    assert all_ids(found.windows()) == [[1, 3, 4, 2, 1, 5, 2]] * 3
    found = corpus(write(name, CHATS, field), chat_tokenizer(), cut="stream", seq_len=100)
    assert all_ids(found.windows()) == [[1, 3, 4, 2, 1, 5, 2] * 3]  # the template writes the EOS


def test_chats_as_sharegpt_has_them(write):
    chat = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    (item,) = open_source(write("a.jsonl", [chat], "conversations")).items()
    assert item == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def test_whether_a_field_is_a_chat(write):
    both = write("a.jsonl", [{"x": 1}], "messages")
    both.write_text(json.dumps({"text": "one", "messages": CHATS[0]}))
    assert list(open_source(both).items()) == ["one"]
    assert list(open_source(both, chat=True).items()) == [CHATS[0]]
    assert list(open_source(both, field="messages").items()) == [CHATS[0]]
    with pytest.raises(DataError, match="field 'text' is not a chat"):
        open_source(both, field="text", chat=True)
    with pytest.raises(DataError, match="field 'messages' is not a text"):
        open_source(both, field="messages", chat=False)


@pytest.mark.parametrize(
    "chat", [[], ["one"], [{"role": "user"}, 3], [{"role": 1, "content": "x"}], [{"content": "x"}], "one",
             [{"role": "user", "content": ["x"]}], [{"role": "user", "content": "\ud800"}], None]
)  # fmt: skip
def test_what_is_no_chat_is_refused(write, chat):
    with pytest.raises(DataError, match="line 1: field 'messages' is not a chat"):
        open_source(write("a.jsonl", [chat], "messages"), chat=True)


def test_between_chats_there_is_what_the_template_writes(write):
    found = corpus(
        write("a.jsonl", CHATS, "messages"), chat_tokenizer("{{ messages[0].content }} ten"), cut="stream"
    )
    assert all_ids(found.windows()) == [[3, 4, 12, 3, 4, 12, 3, 4], [12]]


def test_a_chat_among_texts_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in ["one " * 20_000, CHATS[0]]))
    with pytest.raises(DataError, match=r"a\.jsonl, document 1 is a chat where the first ones are texts"):
        list(corpus(path).windows())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, r"a\.jsonl: the tokenizer cannot make a text of document 0: .*chat_template"),
        (
            "{{ raise_exception('never so') }}",
            r"a\.jsonl: the tokenizer's chat template refuses document 0: never so",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_an_error_of_one_line(write, template, says, workers):
    found = corpus(write("a.jsonl", CHATS, "messages"), chat_tokenizer(template), workers=workers)
    with pytest.raises(DataError, match=says) as error:
        list(found.windows())
    assert "\n" not in str(error.value)


# Windows and cuts


def test_documents_are_put_together_with_the_eos_that_the_tokenizer_has():
    for bos, eos in ((True, True), (False, True), (True, False)):
        tokenizer = special_tokenizer(bos, eos)
        found = corpus(["one two", "", "three"], tokenizer, cut="stream", seq_len=100)
        b, e = [1] * bos, [2] * eos
        assert all_ids(found.windows()) == [[*b, 3, 4, *e, *b, 5, *e]]
    found = corpus(["one </s>", "two"], special_tokenizer(), cut="stream", seq_len=100)
    assert all_ids(found.windows()) == [[1, 3, 2, 1, 4, 2]]  # no second EOS
    tokenizer = special_tokenizer()
    tokenizer.eos_token = "<s>"  # as OPT's, which is in front of each document already
    found = corpus(["one two", "three"], tokenizer, cut="stream", seq_len=100)
    assert all_ids(found.windows()) == [[1, 3, 4, 1, 5]]


@CUTS
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(cut, workers, monkeypatch):
    monkeypatch.setattr(corpora, "TASK_CHARACTERS", 100)
    alone, together = (list(corpus(TEXTS, cut=cut, workers=w).windows()) for w in (0, workers))
    assert list(map(ids, alone)) == list(map(ids, together))
    assert [(w.index, w.resume, w.after) for w in alone] == [(w.index, w.resume, w.after) for w in together]


@CUTS
@pytest.mark.parametrize("budget", [None, 100])
@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_shards_are_disjoint_and_together_the_whole(cut, budget, ranks):
    whole = list(corpus(TEXTS, cut=cut, max_tokens=budget).windows())
    shards = [
        list(corpus(TEXTS, cut=cut, max_tokens=budget, shard=(rank, ranks)).windows())
        for rank in range(ranks)
    ]
    assert all(window.index % ranks == rank for rank in range(ranks) for window in shards[rank])
    together = sorted(chain.from_iterable(shards), key=lambda window: window.index)
    assert [(w.index, ids(w)) for w in together] == [(w.index, ids(w)) for w in whole]
    for rank in range(min(3, ranks)):
        if shards[rank]:
            assert_resumes(corpus(TEXTS, cut=cut, max_tokens=budget, shard=(rank, ranks)), shards[rank])


def test_with_documents_a_rank_tokenizes_only_its_own_windows():
    seen: list[str] = []

    class Tokenizer:
        def __call__(self, text, add_special_tokens=True, verbose=True):
            seen.append(text)
            return {"input_ids": list(text.encode())}

    texts = [text for text in TEXTS if text]
    windows = list(corpus(texts, Tokenizer(), shard=(1, 3)).windows())
    assert [window.index % 3 for window in windows] == [1] * len(windows)
    assert bytes(chain.from_iterable(chain.from_iterable(map(ids, windows)))).decode() == "".join(seen)
    assert len(seen) < len(texts) / 2


@CUTS
@pytest.mark.parametrize("budget", [1, 7, 8, 9, 50, 133, 10**6])
def test_the_budget_is_met_to_the_token_in_the_corpus_order(cut, budget):
    tokenizer = special_tokenizer()
    expected, room = [], budget
    for block in ORACLES[cut](TEXTS, tokenizer):
        expected += [block[:room]] if room > 0 else []
        room -= len(block)
    found = corpus(TEXTS, tokenizer, cut=cut, max_tokens=budget)
    windows = list(found.windows())
    assert all_ids(windows) == expected
    assert_resumes(found, windows)


def test_windows_are_cut_by_characters_and_by_documents(monkeypatch):
    windows = list(corpus(["one two"] * 20, window_characters=21).windows())
    assert [(w.index, w.documents, w.characters) for w in windows[:2]] == [(0, 3, 21), (1, 3, 21)]
    assert windows[-1].documents == 2
    monkeypatch.setattr(corpora, "WINDOW_DOCUMENTS", 5)
    assert [w.documents for w in corpus(["one"] * 11, window_characters=1000).windows()] == [5, 5, 1]


def test_windows_follow_the_size_of_the_corpus():
    sizes = [corpus(["one " * n], window_characters=None, max_tokens=m).window_characters
             for n, m in ((10, None), (2**21, None), (2**21, 2**20), (10, 100))]  # fmt: skip
    assert sizes == [2**16, 2**18, 2**17, 2**16]
    for size in (2**40, None):  # None: nobody knows
        source = replace(data.held_texts(["one"]), size=size)
        assert corpus(source, window_characters=None).window_characters == 2**22


def test_no_more_windows_are_read_ahead_than_wanted():
    read = []

    class Counting(readers.InMemoryReader):
        def __next__(self):
            read.append(self.next)
            return super().__next__()

    source = data.held_texts(["one two"] * 1000)
    object.__setattr__(source, "read", lambda cut=None, position=None: Counting(source.held, position))
    windows = corpus(source, window_characters=21).windows()
    read.clear()  # what the hash of the beginning took
    next(windows)
    time.sleep(0.1)  # as long as it likes
    assert 3 <= len(read) <= 3 * (1 + corpora.AHEAD + 1)
    windows.close()


def test_empty_data_are_an_error_on_every_rank_and_an_idle_rank_is_none():
    for rank in (0, 1):
        with pytest.raises(DataError, match="no tokens in texts: every text in it is empty"):
            list(corpus(["", ""], shard=(rank, 2)).windows())
    assert list(corpus(["one"], shard=(1, 2)).windows()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cut": "lines"}, "unknown cut 'lines'"),
        ({"shard": (2, 2)}, "shard"),
        ({"window_characters": 0}, "window_characters"),
        ({"workers": -1}, "workers"),
        ({"seq_len": 0}, "seq_len"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        corpus(TEXTS, **options)


def test_positions_of_other_corpora_and_damaged_ones_are_refused():
    found = corpus(TEXTS, cut="stream")
    record = list(found.windows())[2].resume
    for other in ({"cut": "documents"}, {"seq_len": 9}, {"max_tokens": 5}, {"window_characters": 301}):
        with pytest.raises(DataError, match="belongs to another corpus than texts"):
            corpus(TEXTS, **({"cut": "stream"} | other)).windows(record)
    with pytest.raises(DataError, match="another corpus"):
        corpus(TEXTS, special_tokenizer(bos=False), cut="stream").windows(record)
    with pytest.raises(DataError, match="another corpus"):
        corpus(TEXTS[:-1], cut="stream").windows(record)
    changes = [{"index": -1}, {"index": True}, {"tokens": "3"}, {"rest": [1] * 8}, {"rest": [2**31]}, {"rest": "a"},
               {"position": 3}, {"position": {"item": -1}}, {"position": {"other": 1}}, {"sha256": 1}, {"new": 1}]  # fmt: skip
    for change in changes:
        with pytest.raises(DataError, match="position to resume from is not one in this corpus"):
            list(found.windows(record | change))
    with pytest.raises(DataError, match="position to resume from is not one in this corpus"):
        found.windows([])


def test_the_identity_names_the_data_and_tells_it_from_others(write):
    whole = corpus(write("a.jsonl")).identity
    assert json.loads(json.dumps(whole)) == whole
    assert whole["sha256"] == open_source(write("a.jsonl")).sha256
    parts = [corpus(write("a.jsonl"), shard=(rank, 2)).identity for rank in (0, 1)]
    assert [part | {"shard": [0, 1]} for part in parts] == [whole, whole]
    # the hash of how it begins is of the texts, whatever the file, the cut or the windows
    heads = {corpus(given).identity["head_sha256"] for given in (*map(write, FILES), TEXTS)}
    heads |= {corpus(TEXTS, cut="stream", seq_len=5, window_characters=99).identity["head_sha256"]}
    assert heads == {whole["head_sha256"]}
    others = [corpus(given).identity["head_sha256"] for given in (some_texts(60, seed=1), TEXTS[:-1])]
    assert len({whole["head_sha256"], *others}) == 3


def test_the_running_hash_is_of_what_was_read():
    one, two = (list(corpus([*TEXTS[:50], last]).windows()) for last in ("one", "two"))
    assert [w.after["sha256"] for w in one][:-1] == [w.after["sha256"] for w in two][:-1]
    assert one[-1].after["sha256"] != two[-1].after["sha256"]
    assert one[-1].after["documents"] == 51
    assert one[-1].after["characters"] == sum(map(len, TEXTS[:50])) + 3


def test_the_fingerprint_is_of_the_tokenizer_and_not_of_who_used_it():
    first = special_tokenizer()
    before = tokenizer_fingerprint(first)
    first(["one", "two three"], padding=False, truncation=True, max_length=1)
    assert tokenizer_fingerprint(first) == before == tokenizer_fingerprint(special_tokenizer())
    assert tokenizer_fingerprint(special_tokenizer(bos=False)) != before
    assert tokenizer_fingerprint(chat_tokenizer(), chat=True) != tokenizer_fingerprint(first, chat=True)


def test_a_tokenizer_that_cuts_or_pads_is_used_whole():
    """Its backend alone, which is faster: the tokenizer is asked for nothing but the probe, before the windows."""
    asked = []

    class Watched(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            asked.append(text)
            return super().__call__(text, **options)

    tokenizer = Watched(tokenizer_object=special_tokenizer().backend_tokenizer)
    tokenizer("one two three four", truncation=True, max_length=2)
    found = corpus(["one two three four"], tokenizer)
    asked.clear()
    assert all_ids(found.windows()) == [[1, 3, 4, 5, 6]]
    assert asked == []


def test_a_tokenizer_whose_backend_is_not_all_of_it_is_asked_itself():
    class Reversing(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            found = super().__call__(text, **options)
            return {"input_ids": found["input_ids"][::-1]}

    tokenizer = Reversing(tokenizer_object=special_tokenizer().backend_tokenizer)
    assert all_ids(corpus(["one two three"], tokenizer).windows()) == [[5, 4, 3, 1]]


def test_the_largest_token_of_a_window():
    (window,) = corpus(["one ten", "two"]).windows()
    assert (window.largest_token, window.tokens) == (12, 5)


# Processes and memory


def test_the_memory_does_not_grow_with_the_corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(24_000):
            file.write(json.dumps({"text": f"{number} one two three " * 5}) + "\n")
    windows = corpus(path, ascii_tokenizer(), seq_len=64, window_characters=2**16).windows()
    alive: list[weakref.ref] = []
    tracemalloc.start()
    peaks = []
    for number, window in enumerate(windows):
        alive = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(window.sequences[0]))
        assert len(alive) <= 3
        if number % 12 == 11:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert len(peaks) >= 2
    assert peaks[-1] < 1.2 * peaks[0] + 2**17


def children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


def gone(pids) -> bool:
    import psutil

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_closing_ends_the_processes_and_threads():
    before, threads = children(), threading.active_count()
    windows = corpus(TEXTS, workers=2).windows()
    next(windows)
    assert children() - before
    windows.close()
    assert children() == before
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_a_process_that_dies_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(corpora, "AHEAD", 1)
    before = children()
    windows = corpus(TEXTS, workers=1).windows()
    next(windows)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a tokenizing process was ended by SIGKILL \(out of memory\?\)"):
        list(windows)
    assert children() == before


def test_a_tokenizer_that_fails_in_a_process_is_an_error_of_one_line():
    class Broken:
        """Arrives in the other process as `int("no number")`, which fails there."""

        def __call__(self, text, **_):
            return {"input_ids": [1]}

        def __reduce__(self):
            return int, ("no number",)

    with pytest.raises(RuntimeError, match=r"^the tokenizer failed in its worker process: .*no number.*$"):
        list(corpus(TEXTS, Broken(), workers=1).windows())


def test_a_tokenizer_that_cannot_be_given_away_is_refused_for_processes():
    class Local:
        def __call__(self, text, **_):
            return {"input_ids": [1]}

    with pytest.raises(OptionError, match="cannot be sent to other processes.*workers=0"):
        list(corpus(TEXTS, Local(), workers=1).windows())


SCRIPT = """
import sys, time
import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from fastheads.corpus.windows import Corpus
from fastheads.corpus.sources import held_texts

class Words:
    backend_tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))
    backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

corpus = Corpus(held_texts(["one two three"] * 100_000), Words(), seq_len=8, window_characters=1000, workers=2)
try:
    for number, window in enumerate(corpus.windows()):
        if number == 10:
            print(*(child.pid for child in psutil.Process().children()), flush=True)
        time.sleep(0.001)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_and_no_word_is_left_behind_by_a_signal(number):
    """No `if __name__ == "__main__"` in the script, either. Ctrl-C goes to the whole group."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)
    assert len(pids) == 2
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    assert said == ("", "")
    assert gone(pids)


# Batches


def padding(lengths, batches) -> float:
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / computed


@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_a_plan_holds_each_row_once_and_keeps_to_the_budget(max_rows):
    rng = random.Random(1)
    for budget in (1, 40, 100):
        lengths = [rng.randint(1, 60) for _ in range(200)]
        batches = plan(lengths, budget, max_rows)
        assert batches == plan(tuple(lengths), budget, max_rows)
        assert sorted(chain.from_iterable(batches)) == list(range(200))
        for batch in batches:
            assert len(batch) * max(lengths[row] for row in batch) <= budget or len(batch) == 1
            assert len(batch) <= (max_rows or 200)
        longest = [max(lengths[row] for row in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)


def test_plans_by_hand():
    assert plan([3, 9, 4, 4, 2], 10) == [[1], [2, 3], [0, 4]]
    assert plan([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert plan([], 10) == []
    for budget, rows in ((0, None), (10, 0)):
        with pytest.raises(ValueError, match="needs room"):
            plan([1], budget, rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("seq_len", "budget"), [(512, 2**15), (2048, 2**15), (2048, 2**16)])
def test_lognormal_documents_are_padded_by_less_than_five_percent(seq_len, budget, seed):
    """A large corpus' window: a million tokens of documents with a median of 300 tokens."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < corpora.WINDOW_CHARACTERS // 4:
        lengths += map(len, split([0] * (1 + int(rng.lognormvariate(5.7, 1))), seq_len))
    assert padding(lengths, plan(lengths, budget)) < 0.05
    in_order = [
        list(range(i, min(i + budget // seq_len, len(lengths))))
        for i in range(0, len(lengths), budget // seq_len)
    ]
    assert padding(lengths, in_order) > 0.2


def test_real_documents_are_padded_by_less_than_five_percent():
    """The topics of Python's own documentation, in what a corpus of that size gives batches."""
    from pydoc_data.topics import topics

    found = corpus(list(topics.values()) * 4, ascii_tokenizer(), seq_len=2048, window_characters=None)
    for window in found.stretches():
        lengths = list(map(len, window.sequences))
        assert padding(lengths, plan(lengths, 2**15)) < 0.05


def test_small_windows_are_joined_and_resume_where_they_ended():
    texts = ["wor " * 1_000] * 900  # 3.6 million characters, in 32 windows
    found = corpus(texts, seq_len=512, window_characters=None)
    windows, stretches = list(found.windows()), list(found.stretches())
    assert len(windows) == 32 and len(stretches) == 4
    assert all(stretch.characters >= corpora.STRETCH_CHARACTERS for stretch in stretches[:-1])
    joined = [ids.tolist() for stretch in stretches for ids in stretch.sequences]
    assert joined == [ids.tolist() for window in windows for ids in window.sequences]
    assert sum(stretch.documents for stretch in stretches) == 900
    for i, stretch in enumerate(stretches):
        again = next(found.stretches(json.loads(json.dumps(stretch.resume))))
        assert (again.index, ids(again), again.after) == (stretch.index, ids(stretch), stretch.after)
        rest = [part.index for part in found.stretches(json.loads(json.dumps(stretch.after)))]
        assert rest == [part.index for part in stretches[i + 1 :]]
    given = corpus(texts, seq_len=512, window_characters=2**18)
    assert [part.index for part in given.stretches()] == [part.index for part in given.windows()]


@pytest.mark.parametrize("documents", [1_000, 5_000])
def test_small_corpora_are_padded_by_less_than_five_percent_in_the_batches_of_a_large_gpu(documents):
    """Log-normal lengths, tokens of about four characters, in what a corpus of that size gives batches."""
    chance = random.Random(0)
    lengths = [min(int(chance.lognormvariate(5.5, 1.0)) + 1, 2048) for _ in range(documents)]
    found = corpus(["wor " * n for n in lengths], seq_len=2048, window_characters=None)
    real = area = 0
    for window in found.stretches():
        rows = list(map(len, window.sequences))
        batches = plan(rows, 2**15)
        real += sum(rows)
        area += sum(len(batch) * rows[batch[0]] for batch in batches)
    assert real == sum(lengths) + documents  # the tokenizer begins each with a token of its own
    assert 1 - real / area < 0.05


def test_collated_rows_can_be_pinned():
    rows = [torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)]
    batch = token_batches.collate(rows, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    if torch.cuda.is_available():
        assert all(value.is_pinned() for value in token_batches.collate(rows, pin_memory=True).values())
