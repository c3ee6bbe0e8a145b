"""What is given as data is taken for what it is, or refused by name: never for what iterating over it gives."""

import array
import gc
import io
import json
import re
import sys
import types
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from oracle import METRICS
from torch.utils.data import DataLoader, TensorDataset
from word_tokenizers import chat_tokenizer, special_tokenizer

from fastheads import HeadProfile, profile
from fastheads.corpus import readers
from fastheads.corpus.filesets import files_source, stdin_source
from fastheads.corpus.opening import open_source
from fastheads.corpus.sources import held_texts, text_file
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, MergeError, OptionError

TEXTS = ["one two", "three", "a longer one than the others"]
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well well"}],
    [{"role": "user", "content": "and now"}],
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path, texts, field="text"):
    Path(path).write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def assert_same_numbers(found, want):
    for metric in METRICS:
        for statistic in ("count", "mean", "min", "max"):
            a, b = (p.results()[metric][statistic] for p in (found, want))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0, msg=lambda said: f"{metric}: {said}")


class Frame:
    """As a table of polars, which is not installed here."""

    def __init__(self, columns):
        self.columns, self._values = list(columns), columns

    def __getitem__(self, name):
        return Series(self._values[name])

    def __iter__(self):
        return iter(self.columns)


class Series:
    def __init__(self, values):
        self._values = values

    def to_list(self):
        return list(self._values)


class LazyFrame:
    columns = ["text"]

    def __iter__(self):
        return iter(self.columns)


@pytest.fixture
def polars(monkeypatch):
    made = types.SimpleNamespace(DataFrame=Frame, Series=Series, LazyFrame=LazyFrame)
    monkeypatch.setitem(sys.modules, "polars", made)


COLUMNS = {"n": [1, 2, 3], "text": TEXTS}
DOCUMENTS = {
    "DataFrame": lambda: pandas.DataFrame(COLUMNS),
    "Series": lambda: pandas.Series(TEXTS),
    "Index": lambda: pandas.Index(TEXTS),
    "categories": lambda: pandas.Series(TEXTS, dtype="category"),
    "polars": lambda: Frame(COLUMNS),
    "polars Series": lambda: Series(TEXTS),
    "Table": lambda: pyarrow.table(COLUMNS),
    "RecordBatch": lambda: pyarrow.RecordBatch.from_pydict(COLUMNS),
    "ChunkedArray": lambda: pyarrow.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "Array": lambda: pyarrow.array(TEXTS),
    "dict of columns": lambda: COLUMNS,
    "dict of Series": lambda: {"text": pandas.Series(TEXTS)},
    "dict of arrays": lambda: {"text": np.array(TEXTS)},
    "array": lambda: np.array(TEXTS),
    "objects": lambda: np.array(TEXTS, dtype=object),
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "dict values": lambda: dict(enumerate(TEXTS)).values(),
    "records": lambda: [{"text": text, "n": 1} for text in TEXTS],
    "records of a generator": lambda: ({"text": text} for text in TEXTS),
    "Dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_what_holds_texts_is_documents(model, polars, kind):
    options = {"tokenizer": ascii_tokenizer(), "seq_len": 16}
    want = profile(model, TEXTS, **options)
    found = profile(model, DOCUMENTS[kind](), **options)
    assert_same_numbers(found, want)
    assert found.metadata["data"]["complete"] is True
    if kind != "Dataset":  # the same texts are the same data, whatever held them
        assert found.metadata["data"]["sha256"] == want.metadata["data"]["sha256"]


def test_another_column_can_hold_the_documents(model, polars):
    options = {"tokenizer": ascii_tokenizer(), "seq_len": 16}
    want = profile(model, TEXTS, **options)
    columns = {"text": ["x", "y", "z"], "body": TEXTS}
    for data in (
        pandas.DataFrame(columns),
        Frame(columns),
        pyarrow.table(columns),
        columns,
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    ):
        assert_same_numbers(profile(model, data, field="body", **options), want)


@pytest.mark.parametrize("shape", ["messages", "conversations", "lists", "DataFrame", "columns"])
def test_chats_in_memory_go_through_the_template(model, shape):
    said = CHATS
    if shape == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        said = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    data = {
        "messages": [{"messages": chat, "id": 1} for chat in said],
        "conversations": [{"conversations": chat} for chat in said],
        "lists": said,
        "DataFrame": pandas.DataFrame({"messages": said}),
        "columns": {"messages": said},
    }[shape]
    source = open_source(data)
    assert list(source.items()) == CHATS
    assert source.sha256 == open_source([{"messages": chat} for chat in CHATS]).sha256
    found = profile(model, data, tokenizer=chat_tokenizer(), seq_len=16)
    assert found.metadata["data"]["sequences"] == 2


TOKENS = {
    "lists": lambda: ROWS,
    "tuples": lambda: tuple(map(tuple, ROWS)),
    "generator": lambda: iter(ROWS),
    "arrays": lambda: [np.array(row, dtype=np.uint16) for row in ROWS],
    "numbers of numpy": lambda: [list(np.array(row)) for row in ROWS],
    "Series": lambda: pandas.Series(ROWS),
    "mappings of lists": lambda: [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS],
    "Dataset": lambda: datasets.Dataset.from_dict({"input_ids": ROWS}),
    "DataLoader": lambda: DataLoader([{"input_ids": torch.tensor(row)} for row in ROWS], batch_size=1),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_token_ids_are_run_as_they_are(model, kind):
    want = profile(model, [torch.tensor([row]) for row in ROWS])
    found = profile(model, TOKENS[kind]())
    assert_same_numbers(found, want)
    assert found.metadata["data"]["tokens"] == 9
    assert found.metadata["data"]["complete"] is True


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int32])
def test_an_array_of_token_ids_is_a_batch(model, dtype):
    ids = np.arange(1, 13).reshape(3, 4).astype(dtype)
    want = profile(model, torch.arange(1, 13).view(3, 4))
    assert_same_numbers(profile(model, ids), want)
    assert_same_numbers(profile(model, {"input_ids": ids.tolist()}), want)


REFUSED = [
    (b"bytes of a text", "bytes is no text: decode it"),
    ([b"bytes of a text"], "bytes is no text: decode it"),
    (bytearray(b"text"), "bytearray is no text"),
    (np.array([b"one"]), r"an array of \|S3 \[1\] is neither texts"),
    (np.array([1.5]), "an array of float64"),
    (np.array([[True]]), "an array of bool"),
    (np.array([["one"]]), r"an array of <U3 \[1, 1\]"),
    (np.array(["one", 3], dtype=object), "text 1 of the data is not a text"),
    ({"one", "two"}, "a set has no order"),
    (io.StringIO("a line\n"), "an open file"),
    ([1, 2, 3], "item of the data is a number: token ids are given by sequences"),
    (range(5), "item of the data is a number"),
    (array.array("i", [1, 2]), "item of the data is a number"),
    ([True], "not bool"),
    ([None], "not NoneType"),
    ([[]], "not list"),
    ([["one", "two"]], "an item of the data is a list of str"),
    ([[1.5]], "an item of the data is a list of float"),
    ([[1, 2], ["one"]], "not list"),
    ([[1, 2], "one"], "not str"),
    ([torch.ones(1, 2).long(), "one"], "not str"),
    ({"text": "one text"}, "the dict of columns: 'text' is str and no column"),
    ({"text": []}, "the dict of columns has no rows"),
    ({"body": ["one"]}, "the dict of columns has no field 'text' .its fields: 'body'"),
    ({}, "no field 'text'"),
    ({"messages": CHATS[0]}, "row 0: field 'messages' is not a chat"),
    ({"input_ids": [[1, 2], [3]]}, "input_ids of a token batch must be a tensor of whole numbers"),
    ([{"text": "one"}, {"body": "two"}], "record 1 of the data has no field 'text'"),
    ([{"text": "one"}, "two"], "record 1 of the data is str where the first is a dict"),
    ([{"text": "one"}, {"text": None}], "record 1 of the data: field 'text' is not a text"),
    ([{"messages": []}], "record 0 of the data: field 'messages' is not a chat"),
    ([CHATS[0], "two"], "document 1 of the data"),
    (pandas.DataFrame({"a": ["x"]}), "the DataFrame has no field 'text' .its fields: 'a'"),
    (pandas.DataFrame({"text": []}), "the DataFrame has no rows"),
    (pandas.DataFrame({"text": ["a", None]}), "the DataFrame, row 1: field 'text' is not a text"),
    (pandas.DataFrame({0: ["x"]}), "the DataFrame has no field 'text'"),
    (pandas.Series([1, 2]), "item of the data is a number"),
    (pandas.Series([], dtype=str), "no data"),
    (pyarrow.table({"a": ["x"]}), "the table has no field 'text'"),
    (
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}),
        "a dict of splits: choose one of data.'train'.",
    ),
    (DataLoader(TensorDataset(torch.ones(2, 3).long())), "not list"),
    (DataLoader(["one", "two"], batch_size=2), "a list of str"),
    (object(), "not object"),
    (len, "not builtin_function_or_method"),
    ((), "no data"),
    (dict.fromkeys(["a", "b"]).keys(), None),
]


@pytest.mark.parametrize(("data", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_understood_is_refused_by_name(model, data, says):
    if says is None:  # texts in an order
        assert profile(model, data, tokenizer=ascii_tokenizer()).metadata["data"]["tokens"] == 2
        return
    with pytest.raises(DataError, match=says) as error:
        profile(model, data, tokenizer=ascii_tokenizer())
    assert "\n" not in str(error.value)


def test_a_table_of_an_unknown_library_is_no_list_of_its_columns(model, polars):
    unknown = types.SimpleNamespace(columns=["text"], __iter__=lambda: iter(["text"]))
    for data, says in ((LazyFrame(), "collect"), (unknown, "a table of the type SimpleNamespace")):
        with pytest.raises(DataError, match=says):
            profile(model, data, tokenizer=ascii_tokenizer())


# Names of files


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a.jsonl", "b.txt"], "'a.jsonl' looks like the name of a file"),
        (["some words", "none.csv"], "'none.csv' looks like the name of a file"),
        (["https://host/a.parquet"], "looks like the name of a file"),
        (["d/*.jsonl.gz"], "looks like the name of a file"),
        (["some words", "README"], "'README' is the name of a file"),
        (["folder"], "'folder' is the name of a folder"),
    ],
)
@pytest.mark.parametrize("kind", [list, iter, np.array, pandas.Series])
def test_texts_that_name_files_are_refused(model, here, texts, says, kind):
    (here / "README").write_text("something")
    (here / "folder").mkdir()
    with pytest.raises(DataError, match=re.escape(says)) as error:
        profile(model, kind(texts), tokenizer=ascii_tokenizer())
    assert "pathlib.Path" in str(error.value)
    assert "held_texts" in str(error.value)
    found = profile(model, held_texts(texts), tokenizer=ascii_tokenizer())
    assert found.metadata["data"]["sequences"] == len(texts)


def test_texts_that_merely_speak_of_files_are_texts(model, here):
    (here / "folder").mkdir()
    texts = ["see a.txt", "folder", "the file\nREADME.txt", "v1.2", "end.", ".", "x" * 2000 + ".txt"]
    found = profile(model, texts, tokenizer=ascii_tokenizer(), seq_len=64)
    assert found.metadata["data"]["complete"] is True


def test_paths_are_files(model, here):
    write_lines("a.jsonl", TEXTS[:1])
    write_lines("b.jsonl", TEXTS[1:])
    options = {"tokenizer": ascii_tokenizer(), "seq_len": 16}
    want = profile(model, TEXTS, **options)
    paths = [Path("a.jsonl"), Path("b.jsonl")]
    (here / "sub").mkdir()
    for path in paths:
        (here / "sub" / path.name).write_bytes(path.read_bytes())
    for data in (
        paths,
        tuple(paths),
        iter(paths),
        here.glob("[ab].jsonl"),
        "*.jsonl",
        Path("*.jsonl"),
        "sub",
        here / "sub",
    ):
        if isinstance(data, types.GeneratorType):
            data = sorted(data)
        found = profile(model, data, **options)
        assert_same_numbers(found, want)
        assert found.metadata["data"]["complete"] is True
    with pytest.raises(DataError, match="item 1 of the data is str where the first is a path"):
        profile(model, [Path("a.jsonl"), "b.jsonl"], **options)
    with pytest.raises(DataError, match="cannot read the data file none.txt"):
        profile(model, [Path("none.txt")], **options)
    with pytest.raises(DataError, match="no data file matches"):
        profile(model, "none*.txt", **options)


def test_a_single_file_has_the_identity_that_it_always_had(here):
    write_lines("a.jsonl", TEXTS)
    plain = text_file("a.jsonl")
    for given in ("a.jsonl", Path("a.jsonl"), [Path("a.jsonl")], "a.*", "./"):
        found = open_source(given)
        assert (found.sha256, found.size, found.version) == (plain.sha256, plain.size, ())
        assert "files_sha256" not in Corpus(found, ascii_tokenizer(), seq_len=8).identity


def ids_of(source, tokenizer, seq_len=8, **options):
    found = Corpus(source, tokenizer, seq_len=seq_len, window_characters=60, workers=0, **options)
    windows = list(found.windows())
    for window in windows[1:]:
        again = list(found.windows(json.loads(json.dumps(window.resume))))
        left = [w for w in windows if w.index >= window.index]
        assert [[s.tolist() for s in w.sequences] for w in again] == [
            [s.tolist() for s in w.sequences] for w in left
        ]
    return [ids for window in windows for sequence in window.sequences for ids in sequence.tolist()]


def joined(rows):
    return list(chain.from_iterable(rows))


WORDS = ["one two three one two three one two three\n" * 3, "four five\n" * 9, "six\n"]


def test_texts_of_several_files_are_a_stream_with_an_eos_between(here, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 32)
    tokenizer = special_tokenizer()
    for name, text in zip("abc", WORDS, strict=True):
        (here / f"{name}.txt").write_text(text)
    source = files_source(["a.txt", "b.txt", "c.txt"])
    assert source.kind == "stream"
    each = [tokenizer(text)["input_ids"] for text in WORDS]  # with a BOS
    eos = [tokenizer.eos_token_id]
    assert ids_of(source, tokenizer) == each[0] + eos + each[1] + eos + each[2]
    lines = [line for text in WORDS for line in text.splitlines()]
    assert ids_of(source, tokenizer, cut="documents") == [
        i for line in lines for i in tokenizer(line)["input_ids"]
    ]


def test_documents_of_files_of_several_kinds(here):
    tokenizer = special_tokenizer()
    write_lines("a.jsonl", ["one two", "three"])
    pandas.DataFrame({"text": ["four", "five one"]}).to_csv("b.csv", index=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["six", "two"]}), "c.parquet")
    (here / "d.txt").write_text("three four\nfive\n")
    texts = ["one two", "three", "four", "five one", "six", "two"]
    source = files_source(["a.jsonl", "b.csv", "c.parquet"])
    alone = [tokenizer(text)["input_ids"] for text in texts]
    assert ids_of(source, tokenizer) == joined(alone)
    assert ids_of(source, tokenizer, cut="stream") == joined([*ids, tokenizer.eos_token_id] for ids in alone)
    mixed = files_source(["a.jsonl", "d.txt"])
    for cut in (None, "stream"):
        with pytest.raises(OptionError, match=r"text files \(streams\) and documents cannot be mixed"):
            Corpus(mixed, tokenizer, seq_len=8, cut=cut)
    texts = ["one two", "three", "three four", "five"]
    assert ids_of(mixed, tokenizer, cut="documents") == joined(tokenizer(t)["input_ids"] for t in texts)


def test_several_files_are_told_from_others_and_merge_with_others_only(model, here):
    for name, texts in (("a", ["one", "two"]), ("b", ["three"]), ("c", ["four four"])):
        write_lines(f"{name}.jsonl", texts)
    options = {"tokenizer": ascii_tokenizer(), "seq_len": 16}

    def of(*names, **more):
        return profile(model, [Path(f"{name}.jsonl") for name in names], **options, **more)

    both, swapped, last, other = of("a", "b"), of("b", "a"), of("b"), of("c")
    assert both.metadata["data"]["source"] == "a.jsonl + b.jsonl"
    hashes = {p.metadata["data"]["sha256"] for p in (both, swapped, last, other)}
    assert len(hashes) == 4
    for repeated in (both, swapped, last, of("b", "c")):
        with pytest.raises(MergeError, match="would count twice"):
            HeadProfile.merge([both, repeated])
    merged = HeadProfile.merge([both, other])
    assert merged.metadata["data"]["tokens"] == 6 + 5 + 9
    with pytest.raises(MergeError, match="would count twice"):
        HeadProfile.merge([merged, last])


def test_a_position_in_other_files_is_refused(here):
    write_lines("a.jsonl", TEXTS)
    write_lines("b.jsonl", TEXTS)
    tokenizer = ascii_tokenizer()
    found = Corpus(files_source(["a.jsonl", "b.jsonl"]), tokenizer, seq_len=8, window_characters=10)
    resume = list(found.windows())[-1].resume
    assert resume["position"]["file"] == 1
    fewer = Corpus(files_source(["a.jsonl"]), tokenizer, seq_len=8, window_characters=10)
    for position in ({"file": 2, "byte": 0}, {"file": -1}, {"file": "a"}):
        with pytest.raises(DataError, match="position to resume from is not one"):
            list(found.windows(resume | {"position": position}))
    with pytest.raises(DataError, match="position"):
        list(fewer.windows(resume))


@pytest.fixture
def source_of(monkeypatch):
    """The source of such bytes on standard input."""

    def source(content, **options):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
        return stdin_source(**options)

    return source


def test_a_run_leaves_no_cycle_that_keeps_its_data(model, source_of):
    source = source_of(b'{"text": "one"}\n')
    path = source.path
    gc.collect()
    gc.disable()
    try:
        profile(model, source, tokenizer=ascii_tokenizer(), seq_len=8)
        del source
        assert not path.exists()
    finally:
        gc.enable()


def test_standard_input_is_read_once_and_cannot_be_resumed(model, here, source_of):
    source = source_of(b'\n{"text": "one"}\n{"text": "two"}\n')
    assert list(source.items()) == list(source.items()) == ["one", "two"]
    path = source.path
    assert path.exists()
    for options in ({"checkpoint": here / "c"}, {"checkpoint": here / "c", "resume": True}):
        with pytest.raises(OptionError, match="standard input cannot be resumed"):
            profile(model, source, tokenizer=ascii_tokenizer(), **options)
    found = profile(model, source, tokenizer=ascii_tokenizer(), seq_len=8)
    assert_same_numbers(found, profile(model, ["one", "two"], tokenizer=ascii_tokenizer(), seq_len=8))
    del source
    assert not path.exists()
    text = source_of(b"[1, 2]\nno object\n")
    assert (text.kind, list(text.items())) == ("stream", ["[1, 2]\nno object\n"])
    body = source_of(b'{"body": "one"}\n', field="body")
    assert list(body.items()) == ["one"]
    with pytest.raises(DataError, match="standard input is empty"):
        source_of(b"")
    with pytest.raises(DataError, match="standard input, line 2 is not JSON"):
        list(source_of(b'{"text": "one"}\nno object\n').items())
