"""Sources and batches, with a tokenizer so simple that every token can be counted by hand."""

import hashlib
import json

import pytest
import torch

from fastheads.corpus import readers, token_batches
from fastheads.corpus import sources as data
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError


class Characters:
    """A token a character, its code point; a BOS (1) where special tokens are asked for."""

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        return {"input_ids": [1] * (self.bos and add_special_tokens) + [ord(c) for c in text]}


def sequences(source: data.Source, seq_len: int = 4, max_tokens=None, bos: bool = False) -> list[str]:
    corpus = Corpus(source, Characters(bos), seq_len=seq_len, max_tokens=max_tokens)
    found = [ids for window in corpus.windows() for ids in window.sequences]
    assert all(ids.dtype == torch.int32 for ids in found)
    return ["".join(map(chr, ids.tolist())) for ids in found]


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_text_file_is_one_stream_in_contiguous_blocks(write):
    path = write("a.txt", "abcd\nfgh\r\nk")
    source = data.text_file(path)
    assert sequences(source) == ["abcd", "\nfgh", "\r\nk"]
    assert (source.name, source.kind) == (str(path), "stream")
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sequences(source, 100) == ["abcd\nfgh\r\nk"]


def test_a_stream_has_one_bos_at_its_start(write):
    assert sequences(data.text_file(write("a.txt", "abcdef")), bos=True) == ["\x01abc", "def"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab\ncdefgh\nij\nklm", ["ab\ncdefgh\n", "ij\nklm"]),  # 8 to 16 bytes: where a line ends
        ("abcdefgh\n\nij\nk l", ["abcdefgh\n\nij\n", "k l"]),  # behind no blank line
        ("abcdefg\n\n\nij\n k l", ["abcdefg\n\n\n", "ij\n k l"]),  # unless there are only such
        ("abcdefgh ijklmn opq", ["abcdefgh", " ijklmn opq"]),  # in a long line before a space
        ("ab" * 7 + "ü" * 12, ["ab" * 7, "ü" * 7, "ü" * 5]),  # whole characters
        ("abcdefgh\nijklmno", ["abcdefgh\n", "ijklmno"]),
        ("abcdefgh\nijklmn", ["abcdefgh\nijklmn"]),
    ],
)
def test_a_long_stream_is_read_in_pieces_that_end_where_tokenizers_split(write, monkeypatch, text, pieces):
    source = data.text_file(write("a.txt", text))
    whole = sequences(source, 5, bos=True)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 8)
    assert list(source.items()) == pieces
    assert sequences(source, 5, bos=True) == whole  # blocks run on across pieces, no second BOS


def test_no_more_is_read_than_the_budget_asks_for(write):
    source = data.text_file(write("a.txt", b"abc\n" * 2**18 + b"\xff"))  # a fault far behind
    assert sequences(source, 4, max_tokens=6) == ["abc\n", "ab"]


def test_a_byte_order_mark_is_no_text(write):
    assert sequences(data.text_file(write("a.txt", b"\xef\xbb\xbfab"))) == ["ab"]


@pytest.mark.parametrize("budget", range(1, 13))
def test_the_budget_is_met_to_the_token(write, budget):
    text = "abcdefghijk"  # 11 tokens
    found = sequences(data.text_file(write("a.txt", text)), 4, max_tokens=budget)
    assert "".join(found) == text[:budget]
    assert all(len(block) == 4 for block in found[:-1])


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_are_documents_of_their_own(write, name):
    text = (
        lines({"text": "abcdef"}, {"text": ""}, {"text": "gh", "id": 3}) + "\n" + lines({"text": "ü\u2028z"})
    )
    source = data.text_file(write(name, text))
    assert source.kind == "documents"
    assert sequences(source) == ["abcd", "ef", "gh", "ü\u2028z"]
    assert sequences(source, bos=True) == ["\x01abc", "def", "\x01gh", "\x01ü\u2028z"]
    assert sequences(source, max_tokens=7) == ["abcd", "ef", "g"]


def test_another_field_can_hold_the_text(write):
    path = write("a.jsonl", lines({"body": "ab"}))
    assert sequences(data.text_file(path, field="body")) == ["ab"]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("{nope}", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("9" * 5000, "line 2 is not JSON"),
        ('["text"]', "line 2 is not a JSON object: one object a line"),
        ('{"body": "x", "id": 1}', r"line 2 has no field 'text' \(its fields: 'body', 'id'; field=, or"),
        ('{"text": 3}', "line 2: field 'text' is not a text"),
        (r'{"text": "\ud800"}', "line 2: field 'text' is not a text"),
    ],
)
def test_a_malformed_line_is_named(write, second, says):
    path = write("a.jsonl", lines({"text": "ab"}) + second + "\n")
    with pytest.raises(DataError, match=says) as error:
        sequences(data.text_file(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(write, name):
    path = write(name, "zwölf".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.\w+ is not UTF-8 text"):
        data.text_file(path)


def test_text_that_is_not_utf8_further_on_is_refused(write, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4)
    source = data.text_file(write("a.txt", b"abc\n" * 4000 + b"\xff"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        sequences(source)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "\n\n", "no tokens in"),
        ("a.jsonl", lines({"text": ""}), "no tokens in"),
        ("a.txt", b"\xef\xbb\xbf", "no tokens in"),
    ],
)
def test_empty_data_are_refused(write, name, content, says):
    path = write(name, content)
    with pytest.raises(DataError, match=says):
        sequences(data.text_file(path))


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the data file .*No such file"):
        data.text_file(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder: name a file in it"):
        data.text_file(tmp_path)


@pytest.mark.parametrize(
    ("seq_len", "max_tokens", "says"), [(0, None, "seq_len"), (4, 0, "max_tokens"), (4, -1, "max_tokens")]
)
def test_lengths_below_one_are_refused(seq_len, max_tokens, says):
    with pytest.raises(ValueError, match=f"{says} must be at least 1"):
        sequences(data.held_texts(["abc"]), seq_len, max_tokens)


def test_held_texts_are_documents_and_their_hash_tells_them_apart():
    source = data.held_texts(iter(["abcdef", "", "g"]))
    assert sequences(source) == sequences(source) == ["abcd", "ef", "g"]
    assert source.sha256 == hashlib.sha256(b"abcdef\0\0g\0").hexdigest()
    assert source.sha256 != data.held_texts(["abcdefg"]).sha256


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_held_texts_are_refused(texts):
    with pytest.raises(DataError, match="no tokens in texts"):
        sequences(data.held_texts(texts))


@pytest.mark.parametrize("item", [3, b"bytes", "\udcff"])
def test_what_is_no_text_is_refused(item):
    with pytest.raises(DataError, match="text 1 of the data is not a text"):
        data.held_texts(["fine", item])


def test_the_default_text_is_the_same_each_time_and_named_with_its_python():
    source = data.default_text()
    text = "".join(source.items())
    assert len(text) > 300_000
    assert "\n\n" in text
    assert source.sha256 == hashlib.sha256(text.encode()).hexdigest() == data.default_text().sha256
    assert source.name.startswith("pydoc_data.topics of Python 3.")


def blocks(*lengths: int) -> list[torch.Tensor]:
    return [torch.arange(1, n + 1, dtype=torch.int32) for n in lengths]


def test_batches_of_equal_rows_have_no_mask():
    batch = token_batches.collate(blocks(3, 3))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch["input_ids"].dtype == torch.int64
    assert list(batch) == ["input_ids"]


def test_unequal_rows_are_padded_on_the_right_in_order():
    batch = token_batches.collate(blocks(1, 3, 2), 9)
    assert batch["input_ids"].tolist() == [[1, 9, 9], [1, 2, 3], [1, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert token_batches.tokens_by_row(batch).tolist() == [1, 3, 2]


def test_token_batches_are_tensors_or_mappings():
    ids = torch.tensor([[5, 6], [7, 8]])
    assert token_batches.as_batch(ids)["input_ids"] is ids
    assert token_batches.as_batch({"input_ids": ids, "position_ids": ids})["position_ids"] is ids
    one = token_batches.as_batch({"input_ids": ids[0], "attention_mask": torch.tensor([1, 0])})
    assert one["input_ids"].tolist() == [[5, 6]]
    assert token_batches.tokens_by_row(one).tolist() == [1]
    assert token_batches.tokens_by_row({"input_ids": ids}).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (5, "not int"),
        ({"ids": 3}, "input_ids of a token batch"),
        (torch.ones(2, 2), "whole numbers"),
        (torch.ones(2, 2, 2).long(), r"\[rows, tokens\]"),
        (
            {"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.ones(2, 3)},
            "shape of its input_ids",
        ),
    ],
)
def test_what_is_no_token_batch_is_refused(item, says):
    with pytest.raises(DataError, match=says):
        token_batches.as_batch(item)


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("budget", [1, 3, 4, 5, 6])
def test_a_token_batch_is_cut_to_its_first_real_tokens(side, budget):
    masks = {
        "left": torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "right": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
        "none": torch.ones(2, 3).long(),
    }
    mask = masks[side]
    ids = torch.arange(mask.numel()).view_as(mask)
    batch = {"input_ids": ids, "position_ids": ids + 10} | (
        {} if side == "none" else {"attention_mask": mask}
    )
    before = mask.clone()
    short = token_batches.truncate(batch, budget)
    kept = short["input_ids"][short["attention_mask"] != 0]
    assert kept.tolist() == ids[mask != 0].tolist()[:budget]
    assert (short["attention_mask"].sum(1) > 0).all()
    assert (short["position_ids"] == short["input_ids"] + 10).all()
    assert torch.equal(mask, before)
