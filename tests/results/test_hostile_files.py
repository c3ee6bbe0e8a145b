"""Profiles and checkpoints that were damaged, or made to deceive, are refused in the documented way, or hold what samples give.

The mutations are random and the same in each run. What is possible is said here once more, in Python's own numbers.
"""

import copy
import json
import math
import os
import random
import struct
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from sealed_files import digest, read, resealed, sealed, written
from whole_profiles import some_texts

from fastheads import profile
from fastheads.corpus.sources import held_texts
from fastheads.corpus.windows import Corpus
from fastheads.errors import CheckpointError, DataError, ProfileFileError, ProfileInterrupted
from fastheads.results.head_profile import FILE_KEY, HeadProfile
from fastheads.run.checkpoint import FILE_KEY as CHECKPOINT_KEY
from fastheads.run.checkpoint import Checkpoint

SECONDS = 12  # for each of the tests by random mutations, at most
PLANES = ("count", "nonfinite", "mean", "m2", "min", "max")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


DATA = [torch.arange(4 * n, 4 * n + 8).view(2, 4) % 50 + 1 for n in range(4)]


@pytest.fixture(scope="module")
def good(model):
    return profile(model, DATA, kv_groups=True).to_bytes()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """The content of a checkpoint in the middle of a run."""
    path = tmp_path_factory.mktemp("run") / "c"

    def stop(tokens, total):
        if tokens >= 16:
            raise KeyboardInterrupt

    with pytest.raises(ProfileInterrupted):
        profile(model, DATA, progress=stop, **options(path))
    return path.read_bytes()


def options(path):
    return {"checkpoint": path, "checkpoint_every": 1e-9, "kv_groups": True}


def corpus():
    return Corpus(held_texts(some_texts(12)), ascii_tokenizer(), seq_len=24, window_characters=200, workers=0)


@pytest.fixture(scope="module")
def checkpoint_of_texts(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "c"

    def stop(tokens, total):
        if tokens >= 100:
            raise KeyboardInterrupt

    with pytest.raises(ProfileInterrupted):
        profile(model, corpus(), progress=stop, batch_tokens=60, **options(path))
    return path.read_bytes()


def possible(count, nonfinite, mean, m2, low, high) -> bool:
    """Whether some numbers ≥ 0, so many, may have these moments, with rounding errors of a millionth."""
    if not (0 <= count < 2**60 and 0 <= nonfinite < 2**60):
        return False
    if count == 0:
        return (mean, m2, low, high) == (0, 0, math.inf, -math.inf)
    if not (0 <= low <= high < math.inf):
        return False
    if high * count > 1e150:  # beyond what float64 can square
        return True
    if not (math.isfinite(mean) and math.isfinite(m2)):
        return False
    a, b, mu, m2 = (Fraction(x) for x in (low, high, mean, m2))
    error = b / 10**6 + Fraction(1, 10**300)
    if count == 1:
        return a == b and m2 == 0 and abs(mu - a) <= error
    upper = count * (b - mu + error) * (mu - a + error)
    lower = max(b - mu - error, 0) ** 2 + max(mu - a - error, 0) ** 2
    return a - error <= mu <= b + error and lower * Fraction(99, 100) - count * error**2 <= m2 <= 2 * upper


def check_profile(found: HeadProfile) -> None:
    sites = found.metadata["sites"]
    rows, heads = found.shape
    assert rows == len(sites) >= 1
    assert heads >= 1
    for moments in found.moments.values():
        planes = [plane.tolist() for plane in moments]
        for row in range(rows):
            for head in range(heads):
                values = [plane[row][head] for plane in planes]
                assert possible(*values), values
                assert head < sites[row]["num_heads"] or values[0] == values[1] == 0
    found.results()
    found.ranked_cells(found.metrics[0])
    HeadProfile.merge([found, found], allow_repeated=True)


def loads(path, content: bytes) -> bool:
    """Whether it loads as a profile; it may only be refused in one line, and only hold what is possible."""
    path.write_bytes(content)
    try:
        found = HeadProfile.load(path)
    except ProfileFileError as error:
        assert "\n" not in str(error)
        return False
    check_profile(found)
    return True


def goes_on(model, path, content: bytes, data=None) -> bool:
    path.write_bytes(content)
    how = {} if data is None else {"batch_tokens": 60}
    try:
        found = profile(model, DATA if data is None else data, resume=True, **how, **options(path))
    except (
        CheckpointError,
        DataError,
    ) as error:  # the second where a position leads into the middle of something
        assert "\n" not in str(error)
        return False
    check_profile(found)
    return True


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with one thing changed as disks, networks and editors do."""
    at = chance.randrange(len(content))
    size = min(chance.choice((1, 1, 2, 8, 64)), len(content) - at)
    kind = chance.randrange(6)
    if kind <= 1:
        changed = bytearray(content)
        changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + chance.randbytes(size) + content[at:]
    if kind == 4:
        return content[:at] + content[at + size :]
    return content[:at] + chance.randbytes(size) + content[at + size :]


ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1.5,
    -0.0,
    "",
    "x" * 9,
    "\ud800",
    "\0",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
]


def edited_anywhere(value, chance: random.Random):
    """The document with something in it replaced, removed, doubled, or nested."""
    value = copy.deepcopy(value)
    places = []

    def walk(inner):
        for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    inner, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner[key], int):
        inner[key] += chance.choice((-1, 1, 2**40))
    elif kind == 2 and isinstance(inner[key], list):
        inner[key] = inner[key] * 2
    else:
        inner[key] = chance.choice(ODD)
    return value


def odd_number(chance: random.Random, old: float) -> float:
    return chance.choice(
        (
            0.0,
            -1.0,
            1.0,
            math.nan,
            math.inf,
            -math.inf,
            1e-300,
            1e200,
            1.7e308,
            old * 1.001,
            old * 2,
            -old,
            old / 2,
        )
    )


def changed_arrays(arrays: dict, chance: random.Random) -> dict:
    """The arrays with a number changed, or with a shape that is another."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    name = chance.choice(list(arrays))
    array = arrays[name]
    kind = chance.randrange(12)
    if kind == 0:
        arrays[name] = array.reshape(-1)
    elif kind == 1:
        arrays[name] = array[:0]
    elif kind == 2:
        arrays[name] = array.view(np.int64 if array.dtype.kind == "f" else np.float64)
    elif kind == 3:
        del arrays[name]
    elif kind == 4:
        arrays = {n: np.concatenate((a, a)) for n, a in arrays.items()}
    else:
        at = chance.randrange(array.size)
        if array.dtype.kind == "i":
            array.flat[at] = chance.choice((-1, 0, 1, 2, 2**40, 2**53 + 1, 2**62, 2**63 - 1))
        elif name.startswith("moments") and chance.random() < 0.3:  # counts, as bits
            array.view(np.int64).flat[at] = chance.choice((-1, 0, 1, 2, 2**40, 2**62))
        else:
            array.flat[at] = odd_number(chance, float(array.flat[at]))
    return arrays


def mutations(content: bytes, key: str, seed: int):
    """Files without end: damaged ones; and edited ones, most of them with a digest that fits."""
    chance = random.Random(seed)
    arrays, document = read(content, key)
    while True:
        kind = chance.randrange(4)
        if kind == 0:
            yield damaged(content, chance)
            continue
        edited, changed = document, arrays
        if kind in (1, 3):
            edited = edited_anywhere(document, chance)
        if kind in (2, 3):
            changed = changed_arrays(arrays, chance)
        fits = chance.random() < 0.9
        yield written(changed, key, edited | {"sha256": digest(changed, edited)} if fits else edited)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_mutated_profiles_are_refused_or_possible(good, seed, tmp_path):
    assert loads(tmp_path / "p", good)
    end, tried = time.monotonic() + SECONDS, 0
    for content in mutations(good, FILE_KEY, seed):
        loads(tmp_path / "p", content)
        tried += 1
        if tried == 1500 or time.monotonic() > end:
            break
    assert tried > 50


@pytest.mark.slow
@pytest.mark.parametrize("data", [None, corpus])
def test_mutated_checkpoints_are_refused_or_possible(model, checkpoint, checkpoint_of_texts, data, tmp_path):
    content = checkpoint if data is None else checkpoint_of_texts
    assert goes_on(model, tmp_path / "c", content, data and data())
    end, tried = time.monotonic() + SECONDS, 0
    for changed in mutations(content, CHECKPOINT_KEY, 3):
        goes_on(model, tmp_path / "c", changed, data and data())
        tried += 1
        if tried == 600 or time.monotonic() > end:
            break
    assert tried > 20


@pytest.mark.parametrize("of", ["profile", "checkpoint"])
def test_a_single_flipped_bit_is_seen(of, good, checkpoint, tmp_path):
    content = good if of == "profile" else checkpoint
    chance, path = random.Random(4), tmp_path / "p"
    untouched = HeadProfile.load if of == "profile" else lambda path: Checkpoint(path).load()
    for _ in range(300):
        changed = bytearray(content)
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        # Of a letter in \u00e9 the case may change, and of a blank nothing else that is JSON may come.
        with pytest.raises((ProfileFileError, CheckpointError)):
            untouched(path)


# ---------------------------------------------------------------- the format


def test_the_file_is_what_its_description_says(good):
    arrays, document = read(good, FILE_KEY)
    assert document["format"] == 2
    assert document["sha256"] == digest(arrays, document)
    assert resealed(good, FILE_KEY) == good


def earlier(content: bytes) -> tuple[dict, dict]:
    """What the format before this one had: no digest, and a fingerprint without a scheme."""
    arrays, document = read(content, FILE_KEY)
    del document["sha256"]
    weights = document["metadata"]["weights"]
    del weights["scheme"], weights["unseen_names"]
    return arrays, document | {"format": 1}


def test_profiles_of_the_earlier_format_load(good, tmp_path):
    arrays, document = earlier(good)
    path = tmp_path / "old"
    path.write_bytes(written(arrays, FILE_KEY, document))
    (tmp_path / "new").write_bytes(good)
    old, new = HeadProfile.load(path), HeadProfile.load(tmp_path / "new")
    assert old.metrics == new.metrics
    for metric in new.metrics:
        for a, b in zip(old.moments[metric], new.moments[metric], strict=True):
            assert torch.equal(a, b)
    merged = HeadProfile.merge([old, new], allow_repeated=True)  # by the model's name
    assert merged.metadata["weights"] == new.metadata["weights"]
    arrays["head_output_norm/mean"][0, 0] = -1.0
    assert not loads(path, written(arrays, FILE_KEY, document))
    new.save(path)
    assert read(path.read_bytes(), FILE_KEY)[1]["format"] == 2


@pytest.mark.parametrize("version", [0, 4, True, 1.0, 2.0, "2", None, [2], 10**400])
def test_other_versions_are_refused(good, version, tmp_path):
    path = tmp_path / "p"
    path.write_bytes(resealed(good, FILE_KEY, lambda document: document.update(format=version)))
    with pytest.raises(ProfileFileError, match="its format is .*; this version reads 1 and 2 and 3"):
        HeadProfile.load(path)


def test_checkpoints_of_the_earlier_format_are_refused_by_version(model, checkpoint, tmp_path):
    path = tmp_path / "c"
    arrays, document = read(checkpoint, CHECKPOINT_KEY)
    del document["sha256"]
    path.write_bytes(written(arrays, CHECKPOINT_KEY, document | {"format": 2}))
    with pytest.raises(CheckpointError, match="its format is 2; this version reads 4. Leave out --resume"):
        profile(model, DATA, resume=True, **options(path))


@pytest.mark.parametrize("key", ["sha256", "another"])
def test_a_file_without_its_digest_is_refused(good, key, tmp_path):
    arrays, document = read(good, FILE_KEY)
    document[key] = document.pop("sha256") if key != "sha256" else "0" * 64
    path = tmp_path / "p"
    path.write_bytes(written(arrays, FILE_KEY, document))
    with pytest.raises(ProfileFileError, match="damaged: its content does not match its checksum"):
        HeadProfile.load(path)


def raw(header: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + body


def array(shape="[1]", kind="F64", offsets="[0,8]") -> str:
    return f'"a":{{"dtype":"{kind}","shape":{shape},"data_offsets":{offsets}}}'


def held(*entries: str) -> str:
    return "{" + ",".join(entries) + "}"


def about(document: str) -> str:
    return f'"__metadata__":{json.dumps({FILE_KEY: document})}'


EMPTY = '{"format":2,"metrics":[],"metadata":{}}'
NUMBER = bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        raw(held(about(EMPTY), array("[0,1099511627776]", offsets="[0,0]"))),
        raw(held(about(EMPTY), array("[4294967296,4294967296]")), NUMBER),
        raw(held(about(EMPTY), array("[18446744073709551617]")), NUMBER),
        raw(held(about(EMPTY), array("[-1]", offsets="[8,0]")), NUMBER),
        raw(held(about(EMPTY), array("[1.0]")), NUMBER),
        raw(held(about(EMPTY), array('"1"')), NUMBER),
        raw(held(about(EMPTY), array("[true]")), NUMBER),
        raw(held(about(EMPTY), array(offsets="[0,8,16]")), NUMBER),
        raw(held(about(EMPTY), array(offsets="{}")), NUMBER),
        raw(held(about(EMPTY), array(f"[{','.join('1' * 5000)}]")), NUMBER),
        *(raw(held(about(EMPTY), array(kind=kind)), NUMBER) for kind in ("F4", "C64", "U64", "", "f64", "X")),
        raw(held(about(EMPTY), array(), array()), NUMBER),
        raw(held(about(EMPTY), array(), array().replace('"a"', '"b"')), NUMBER),
        raw(held(about(EMPTY), about(EMPTY), array()), NUMBER),
        raw(held(about(EMPTY), '"a":3'), NUMBER),
        raw(held(about(EMPTY), '"a":null'), NUMBER),
        raw(held('"__metadata__":3', array()), NUMBER),
        raw(held(f'"__metadata__":{{"{FILE_KEY}":3}}', array()), NUMBER),
        *(
            raw(held(about(document), array()), NUMBER)
            for document in (
                "",
                "3",
                "[]",
                "[" * 100_000,
                '{"a":' * 100_000,
                EMPTY.replace("{}", '{"x":' + "[" * 90 + "]" * 90 + "}"),
                EMPTY.replace("{}", '{"x":1e999}'),
                EMPTY.replace("{}", '{"x":-Infinity}'),
                EMPTY.replace("{}", '{"x":NaN}'),
                EMPTY.replace("{}", '{"x":%s}' % ("9" * 5000)),
                EMPTY.replace("{}", '{"x":1,"x":2}'),
                EMPTY.replace('"format":2', '"format":1'),
                EMPTY.replace("2", "9" * 5000),
            )
        ),
        raw("[]"),
        raw("3"),
        raw("[" * 100_000),
        raw('"\\ud800"'),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1),
        struct.pack("<Q", 4) + b"\xff\xfe{\0",
        b"",
        b"1234567",
    ],
)
def test_headers_that_lie_are_refused(content, tmp_path):
    assert not loads(tmp_path / "p", content)
    (tmp_path / "c").write_bytes(content.replace(FILE_KEY.encode(), CHECKPOINT_KEY.encode()))
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path / "c").load()


def test_what_is_no_file_or_too_large_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # with a hole, which takes no place
    for path, says in ((tmp_path / "pipe", "no regular file"), (tmp_path / "large", "more than")):
        with pytest.raises(ProfileFileError, match=says):
            HeadProfile.load(path)
        with pytest.raises(CheckpointError, match=says):
            Checkpoint(path).load()
    with pytest.raises(ProfileFileError, match="no regular file"):
        HeadProfile.load("/dev/zero")


def test_what_was_loaded_stays_when_the_file_changes(good, checkpoint, tmp_path):
    for content, load in (
        (good, lambda path: HeadProfile.load(path).moments["head_output_norm"].mean),
        (checkpoint, lambda path: Checkpoint(path).load()[0]["state/0/0"]),
    ):
        path = tmp_path / "p"
        path.write_bytes(content)
        loaded = load(path)
        before = loaded.clone()
        with path.open("r+b") as file:  # in place, not by another file
            file.write(b"\xff" * len(content))
            file.flush()
            assert torch.equal(loaded, before)
            file.truncate(0)  # reading a map of it would end the process
            assert torch.equal(loaded, before)


@pytest.mark.parametrize(
    "change",
    [
        ("head_output_norm/min", (0, 0), -1.0),
        ("head_output_norm/mean", (0, 0), 1e9),
        ("head_output_norm/m2", (0, 0), 0.0),
        ("head_output_norm/m2", (0, 0), 1e9),
        ("head_output_norm/count", (0, 0), 2**62),
        ("head_output_norm/count", (0, 0), 7),
        ("head_output_norm/nonfinite", (0, 0), 1),
        ("head_residual_update_norm/nonfinite", (0, 0), 1),
        ("kv_group_residual_contribution_norm/nonfinite", (0, 0), 1),
    ],
)
def test_sealed_profiles_that_no_samples_give_are_refused(good, change, tmp_path):
    name, at, value = change
    content = resealed(good, FILE_KEY, change=lambda arrays: arrays[name].__setitem__(at, value))
    assert not loads(tmp_path / "p", content)


def test_metadata_that_are_no_counts_are_refused(good, tmp_path):
    for key, value in (("tokens", -1), ("tokens", 2**63), ("sequences", True), ("tokens", 1.0)):
        content = resealed(good, FILE_KEY, lambda d, k=key, v=value: d["metadata"]["data"].update({k: v}))
        assert not loads(tmp_path / "p", content), (key, value)
    twice = resealed(good, FILE_KEY, lambda d: d["metrics"].append(d["metrics"][0]))
    assert not loads(tmp_path / "p", twice)
    assert loads(tmp_path / "p", written(*((a := read(good, FILE_KEY))[0], FILE_KEY, sealed(*a))))


@pytest.mark.parametrize(
    "inner",
    [
        "[" + "0," * 2_000_000 + "0]",
        "[" + "0.5," * 1_500_000 + "0]",
        "[" + "[]," * 2_000_000 + "0]",
        "[" + "{}," * 2_000_000 + "0]",
    ],
)
def test_large_metadata_are_read_or_refused_within_seconds(inner, tmp_path):
    """As large as a header may be, or nearly so; a list of 60 MB in a checkpoint took half a minute before that was limited."""
    for key, load in ((FILE_KEY, HeadProfile.load), (CHECKPOINT_KEY, lambda path: Checkpoint(path).load())):
        document = json.dumps({key: EMPTY.replace("{}", f'{{"x":{inner}}}')})
        (tmp_path / "p").write_bytes(raw(held(f'"__metadata__":{document}', array()), NUMBER))
        began = time.process_time()
        with pytest.raises((ProfileFileError, CheckpointError)):
            load(tmp_path / "p")
        assert time.process_time() - began < 5


def test_a_header_larger_than_any_run_writes_is_refused_and_not_written(tmp_path, capsys):
    (tmp_path / "c").write_bytes(struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 1))
    with pytest.raises(CheckpointError, match="header is too large"):
        Checkpoint(tmp_path / "c").load()
    assert not Checkpoint(tmp_path / "new").save({}, {"position": "x" * 2**24})
    assert "larger than what is read again" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["c"]
