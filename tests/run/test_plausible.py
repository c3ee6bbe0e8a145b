"""Small files that describe large models, and GGUF files whose headers lie: refused in one line, before memory is taken."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
from checkpoints import save_checkpoint

from fastheads.errors import LoadError
from fastheads.run import loading
from fastheads.run.plausible import check_folder, check_gguf


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(tmp_path / "m")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors=(), data=0, *, version=3, counts=None, **values):
    """The content of a GGUF file of a Llama, with uint32 values and F32 tensors: (dimensions, offset)."""
    llama = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 16, "vocab_size": 10} | values
    content = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, value in llama.items():
        name = name.replace("__", ".")
        content += text(name if "." in name else f"llama.{name}") + struct.pack("<II", 4, value)
    for number, (dimensions, start) in enumerate(tensors):
        content += text(f"t{number}") + struct.pack("<I", len(dimensions))
        content += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, 0, start)
    count = counts or (len(tensors), len(llama) + 1)
    content = b"GGUF" + struct.pack("<IQQ", version, *count) + content
    return content + bytes(-len(content) % 32) + bytes(data)


GOOD = dict(tensors=[((8, 8), 0), ((8, 40), 256)], data=256 + 8 * 40 * 4)


def refused(path, content, says, check=check_gguf):
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(LoadError, match=says) as no:
        check(path)
    assert time.process_time() - began < 1
    assert "\n" not in str(no.value) and len(str(no.value)) < 400


def test_gguf_files_that_cannot_hold_what_they_announce(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(**GOOD))
    check_gguf(path)
    for changes, says in (
        ({"block_count": 2**32 - 1}, "block_count is 4294967295, which no model has"),
        ({"embedding_length": 2**20, "block_count": 100}, "describes a model of about .* but holds 384"),
        ({"vocab_size": 2**30}, "describes a model of about"),
        ({"feed_forward_length": 2**30}, "describes a model of about"),
        ({"expert_count": 2**31}, "expert_count is"),
        ({"tensors": [((2**20, 2**20), 0)]}, "a tensor of 1,099,511,627,776 numbers has"),
        ({"tensors": [((2**63, 2**63), 0)]}, "a tensor of"),
        ({"tensors": [((8, 40), 0)] * 9}, "tensors lie over one another"),
        ({"tensors": [((8, 40), 0), ((8, 40), 2**60)]}, "a tensor of 320 numbers has 0 bytes"),
        ({"counts": (2**60, 5)}, "announces .* entries, more than it has bytes for"),
        ({"counts": (2, 2**60)}, "announces"),
        ({"counts": (200, 5)}, "GGUF"),
        ({"split__count": 3}, "one of 3 parts .*--merge"),
    ):
        refused(path, gguf(**(GOOD | changes)), says)
    for length in (0, 4, 10, 40, 100):
        if length:
            refused(path, gguf(**GOOD)[:length], "damaged GGUF file")


def test_mutated_gguf_headers_are_refused_or_pass_in_no_time(tmp_path):
    good, path = gguf(**GOOD), tmp_path / "a.gguf"
    outcomes = set()
    for seed in range(3000):
        chance, content = random.Random(seed), bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(4, len(good) - GOOD["data"])] = chance.choice(
                [0, 1, 9, 127, 255, chance.randrange(256)]
            )
        path.write_bytes(content)
        began = time.process_time()
        try:
            check_gguf(path)
            outcomes.add(True)
        except LoadError as error:
            outcomes.add(False)
            assert "\n" not in str(error)
        assert time.process_time() - began < 1
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_hidden_layers": 2**64}, "num_hidden_layers is 18446744073709551616, which no model has"),
        ({"num_hidden_layers": 10**200}, "num_hidden_layers is a number of 665 bits"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000"),
        ({"hidden_size": 2**20}, "describes a model of about .* parameters, but its weights have"),
        ({"vocab_size": 2**31 - 1}, "describes a model of about"),
        ({"head_dim": 2**31 - 1}, "describes a model of about"),
        ({"intermediate_size": -5}, "intermediate_size is -5"),
        ({"text_config": {"num_hidden_layers": 2**64}}, "num_hidden_layers is"),
    ],
)
def test_configurations_of_models_that_the_weights_cannot_be(folder, change, says):
    path = folder / "config.json"
    check_folder(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(LoadError, match=says) as no:
            load(loading.find_model(str(folder)))
        assert "\n" not in str(no.value)


def test_a_configuration_of_megabytes_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(LoadError, match="has more than 16,777,216 bytes"):
        check_folder(Path(folder))
