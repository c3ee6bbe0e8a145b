"""Small files that hold very long documents, and bytes and numbers that are none: one line each, before memory is taken."""

import gzip
import tracemalloc

import pytest

from fastheads.corpus import in_memory, readers
from fastheads.corpus.filesets import files_source
from fastheads.corpus.opening import open_source
from fastheads.errors import DataError

LIMIT = 2**20


@pytest.fixture(autouse=True)
def low_limit(monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", LIMIT)


BOMBS = {
    "cell.csv.gz": [b"text\n", *[b"x" * 2**20] * 64],
    "rows.csv.gz": [b'text\n"', *[b"x" * 999 + b"\n"] * 64_000],  # one cell of many lines
    "cells.tsv.gz": [b"text\tb\n", *[b'"' + b"\n" * 500_000 + b'"\t'] * 100],
    "line.jsonl.gz": [b'{"text": "', *[b"x" * 2**20] * 64],
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_document_of_any_length_is_refused_before_it_is_read(name, tmp_path):
    with gzip.open(tmp_path / name, "wb", 1) as file:
        for part in BOMBS[name]:
            file.write(part)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=rf"{name}, (near byte|line) .*: a document of more than 1,048,576 bytes"
        ):
            list(open_source(str(tmp_path / name)).items("documents"))
        assert tracemalloc.get_traced_memory()[1] < 24 * LIMIT
    finally:
        tracemalloc.stop()


def test_what_is_long_but_within_the_limit_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(
        "text\n" + "\n" * (2 * LIMIT) + "x" * (LIMIT - 2) + "\n"
    )  # blank rows are none
    assert [len(text) for text in open_source(str(tmp_path / "a.csv")).items()] == [LIMIT - 2]


@pytest.mark.parametrize(
    "name, content",
    [("a.txt", "{}\n"), ("a.csv", "{}\n"), ("a.jsonl", '{{"text": "{}"}}\n'), ("a.txt.gz", "{}\n")],
)
def test_a_byte_that_is_not_utf8_is_named_with_its_line_and_the_remedy(name, content, tmp_path):
    lines = [content.format("text"), *[content.format("x" * 1400)] * 300, content.format("text")]
    encoded = [line.encode() for line in lines]
    encoded[200] = encoded[200][:-20] + b"\xe9" + encoded[200][-20:]
    content = b"".join(encoded)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: .* 0xe9 in line 201; .*iconv"):
        list(open_source(str(tmp_path / name)).items())


def test_a_number_of_thousands_of_digits_is_named_as_what_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "x", "n": %s}\n' % ("1" * 5000))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON: Exceeds the limit .*digits"):
        list(open_source(str(tmp_path / "a.jsonl")).items())


def test_the_bare_name_of_a_data_set_is_answered_with_how_such_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match="the data file wikitext: No such file .*owner/name, as in owner/wikitext"
    ):
        files_source(["wikitext"], None, "auto")
    for name in ("a.txt", "/no/such"):
        with pytest.raises(DataError, match="No such file or directory$"):
            files_source([name], None, "auto")


def test_the_splits_of_a_dict_of_data_sets_are_named():
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(DataError, match=r"choose one of data\['train'\], data\['test'\]$"):
        in_memory.in_memory(datasets.DatasetDict(train=one, test=one), None, "auto")
