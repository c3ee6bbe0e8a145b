"""The fingerprint of weights: the same for the same weights wherever they lie, another for others."""

import copy
import hashlib
import json
import time
from collections import Counter

import accelerate
import numpy as np
import pytest
import torch
from tiny_models import build, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fastheads
from fastheads.models.fingerprint import ROW, fingerprint


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def found(model):
    return fingerprint(model)


def test_it_is_json_and_the_same_for_a_copy_and_through_a_file(model, found, tmp_path):
    assert json.loads(json.dumps(found)) == found
    assert (found["dtypes"], found["unseen"]) == (["float32"], 0)
    assert found["tensors"] == len(model.state_dict())
    assert fingerprint(copy.deepcopy(model)) == found
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == found


@pytest.mark.parametrize("name", [name for name, _ in build().named_parameters()])
def test_a_change_of_any_parameter_shows(model, found, name):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(name).mul_(1 + 2**-20)
    other = fingerprint(changed)
    assert other["sha256"] != found["sha256"]
    assert other["layout"] == found["layout"]


def test_another_seed_has_the_same_layout_and_another_dtype_has_not(found):
    other, half = fingerprint(build(seed=1)), fingerprint(build(dtype=torch.bfloat16))
    assert other["layout"] == found["layout"] != half["layout"]
    assert len({other["sha256"], found["sha256"], half["sha256"]}) == 3
    assert half["dtypes"] == ["bfloat16"]


def test_samples_reach_the_end_of_a_tensor():
    layer = nn.Linear(ROW + 1, ROW - 1, bias=False)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.weight[-1] += 1
    assert fingerprint(layer) != before


def test_how_a_tensor_lies_in_memory_does_not_matter():
    layer, turned = nn.Linear(70, 30), nn.Linear(70, 30)
    turned.load_state_dict(layer.state_dict())
    turned.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert fingerprint(turned) == fingerprint(layer)


def test_buffers_count_where_a_checkpoint_holds_them():
    def layer(held, passing):
        module = nn.Linear(2, 2)
        nn.init.ones_(module.weight)
        nn.init.ones_(module.bias)
        module.register_buffer("held", torch.tensor(held))
        module.register_buffer("passing", torch.tensor(passing), persistent=False)
        return fingerprint(module)

    assert layer(1, 1) == layer(1, 2) != layer(2, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex128, torch.uint8]
)
def test_every_width_of_numbers_is_read(dtype):
    def of(value):
        module = nn.Module()
        module.register_buffer("x", torch.full((300, 3), value, dtype=torch.float32).to(dtype))
        return fingerprint(module)

    assert of(1.0) == of(1.0) != of(0.0)
    assert of(1.0)["unseen"] == 0


def test_weights_offloaded_to_memory_are_seen_and_those_on_meta_or_disk_are_not(model, found, tmp_path):
    assert fingerprint(accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")) == found
    away = fingerprint(accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu"))
    assert away["layout"] == found["layout"]
    assert away["unseen"] == found["tensors"]
    assert fingerprint(copy.deepcopy(model).to("meta")) == away


def test_wrapped_weights_are_read_inside(model):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantized(factor):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.model.layers[0].mlp.up_proj.weight.mul_(factor)  # of its int8 codes, none moves
        torchao.quantize_(copied, torchao.Int8WeightOnlyConfig())
        return fingerprint(copied)

    once, twice = quantized(1), quantized(2)
    assert once == quantized(1) != twice
    assert once["unseen"] == twice["unseen"] == 0


def test_a_profile_knows_the_weights_it_was_made_of(model, found):
    from fastheads.basic import HookManager as BasicHookManager

    changed = copy.deepcopy(model)
    for manager in (fastheads.HookManager, BasicHookManager):
        with manager(changed) as hooks, torch.inference_mode():
            changed(input_ids=tokens(1, 4))
            assert hooks.to_profile().metadata["weights"] == fingerprint(changed)
            changed.model.layers[0].mlp.up_proj.weight.data.mul_(2)
            hooks.reset()
            changed(input_ids=tokens(1, 4))
            assert hooks.to_profile().metadata["weights"] == fingerprint(changed) != found


# ---------------------------------------------------------------- all bits


def of_tensors(*tensors):
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(f"x{number}", tensor)
    return fingerprint(module)


def by_definition(*tensors):
    """The digest of such a module, with Python's and NumPy's own integers, from the description in the module's docstring."""
    kinds = [(f"x{n}", list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in enumerate(tensors)]
    found = hashlib.sha256(json.dumps([2, kinds]).encode())
    m = np.frombuffer(hashlib.shake_256(b"fastheads").digest(8 * ROW), "<u8") | np.uint64(1)
    for tensor in tensors:
        data = tensor.contiguous().numpy().tobytes()
        words = np.frombuffer(data + bytes(-len(data) % 4), "<i4").astype(object)
        sums = [
            sum(w * int(k) for w, k in zip(words[at : at + ROW], m, strict=False)) % 2**64
            for at in range(0, len(words), ROW)
        ]
        found.update(json.dumps([8 * len(sums)]).encode() + np.array(sums, "<u8").tobytes())
    return found.hexdigest()


def test_it_is_what_its_description_says():
    random = np.random.default_rng(0)
    tensors = [
        torch.from_numpy(random.integers(-(2**63), 2**63 - 1, 9000)),
        torch.from_numpy(random.normal(size=(70, 130)).astype(np.float32)),
        torch.from_numpy(random.integers(0, 256, 16_387).astype(np.uint8)),
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.from_numpy(random.normal(size=(90, 110))).T,
    ]
    assert of_tensors(*tensors)["sha256"] == by_definition(*tensors)


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "up_proj", "down_proj"])
def test_zeroing_every_other_column_shows(name):
    model = build(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64
    )
    before = fingerprint(model)["sha256"]
    for path, module in model.named_modules():
        if path.endswith(name):
            module.weight.data[:, 1::2] = 0
    assert fingerprint(model)["sha256"] != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_change_of_any_single_bit_shows(dtype):
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    tensor = (torch.randn(131, 257, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    before = of_tensors(tensor)["sha256"]
    random = np.random.default_rng(2)
    for index in [0, tensor.numel() - 1, *random.integers(0, tensor.numel(), 60)]:
        for bit in {0, 8 * dtype.itemsize - 1, int(random.integers(0, 8 * dtype.itemsize))}:
            changed = tensor.clone()
            value = 1 << bit
            value -= 2 ** (8 * dtype.itemsize) if value >= 2 ** (8 * dtype.itemsize - 1) and bit != 7 else 0
            changed.view(-1).view(integer)[index] ^= value
            assert of_tensors(changed)["sha256"] != before, (index, bit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_changes_of_many_numbers_that_keep_sums_show(dtype):
    square = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    square[1] = -square[0]
    square[:, 3] = -square[:, 2]
    before = of_tensors(square)["sha256"]

    def swapped(dim, i, j):
        order = torch.arange(256)
        order[[i, j]] = order[[j, i]]
        return square.index_select(dim, order)

    signs = torch.ones(256, dtype=dtype)
    signs[1::2] = -1
    checks = signs[:, None] * signs[None]
    element = square.clone()
    element[0, 0], element[1, 0] = square[1, 0], square[0, 0]  # x and -x
    others = {
        "rows": swapped(0, 10, 20),
        "rows of other sign": swapped(0, 0, 1),
        "columns": swapped(1, 10, 20),
        "columns of other sign": swapped(1, 2, 3),
        "transposed": square.T,
        "turned": square.flip(0),
        "rolled": square.roll(1),
        "elements": element,
        "signs of every other column": square * signs,
        "signs of every other row": square * signs[:, None],
        "signs like a chess board": square * checks,
        "all signs": -square,
    }
    found = {name: of_tensors(other.contiguous())["sha256"] for name, other in others.items()}
    assert len({before, *found.values()}) == len(found) + 1


class Operators(TorchDispatchMode):
    """The largest storage, in bytes, that operators made, and how many of them were given each storage."""

    def __init__(self):
        super().__init__()
        self.largest, self.given = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        self.given.update(known)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_the_layout_in_memory_does_not_matter():
    """Of tensors of several times what is read in one step: laid out otherwise, they are read in other pieces."""
    tensors = [
        torch.randn(3, 700, 1057),
        torch.randn(700, 1201).double(),
        torch.randint(0, 256, (5, 900_001)).to(torch.uint8),
        torch.randn(2, 1_400_000).bfloat16(),
    ]
    want = of_tensors(*tensors)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    sliced = [torch.cat((t, t), dim=-1)[..., : t.shape[-1]] for t in tensors]
    odd = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in tensors]
    for others in (turned, sliced, odd):
        with Operators() as seen:
            assert of_tensors(*others) == want
        assert seen.largest < 1.5 * 2**20  # and never is much of them copied


def test_threads_change_nothing():
    tensors = [torch.randn(3_000_000), torch.randn(1001, 777)]
    before = torch.get_num_threads()
    try:
        found = [torch.set_num_threads(number) or of_tensors(*tensors) for number in (1, 3)]
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_what_is_tied_is_read_once():
    """By the processor time of 32 names of one tensor, and of 32 tensors."""

    def seconds(parameters):
        module = nn.Module()
        for number, parameter in enumerate(parameters):
            module.register_parameter(f"w{number}", parameter)
        before = time.process_time()
        assert fingerprint(module)["tensors"] == 32
        return time.process_time() - before

    def one():
        return nn.Parameter(torch.randn(1024, 1024))

    fingerprint(nn.Linear(4, 4))
    assert seconds([one()] * 32) < seconds([one() for _ in range(32)]) / 4


def test_scales_beside_the_parameters_are_seen():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def eight_bit(factor):
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
        with torch.no_grad():
            (layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB)[3] *= factor
        return fingerprint(layer)

    def four_bit(edit):
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, bias=False, compress_statistics=True, quant_type="nf4", compute_dtype=torch.float32
        ).to("cpu")
        edit(layer.weight.quant_state)
        return fingerprint(layer)

    assert eight_bit(1) == eight_bit(1) != eight_bit(2)
    found = [
        four_bit(edit)["sha256"]
        for edit in (
            lambda state: None,
            lambda state: state.absmax.add_(1),
            lambda state: state.code.mul_(2),
            lambda state: state.state2.absmax.mul_(2),
            lambda state: state.state2.code.mul_(2),
            lambda state: state.offset.add_(1),
        )
    ]
    assert len(set(found)) == len(found)


def test_hqq_s_scales_are_seen():
    hqq = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

    def quantized(key):
        torch.manual_seed(0)
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
        layer = hqq.HQQLinear(nn.Linear(64, 64, bias=False), config, torch.float32, device="cpu")
        if key:
            layer.meta[key] = layer.meta[key] * 2
        return fingerprint(layer)["sha256"]

    assert quantized(None) == quantized(None)
    assert len({quantized(None), quantized("scale"), quantized("zero")}) == 3


def test_what_a_rank_has_only_a_part_of_or_cannot_be_read_is_not_seen():
    sharded = nn.Linear(4, 4, bias=False)
    whole = fingerprint(sharded)
    sharded.weight.ds_id = 1  # as ZeRO-3 marks its own
    sparse = nn.Module()
    sparse.register_buffer("x", torch.eye(3).to_sparse())
    for module in (sharded, sparse):
        assert fingerprint(module)["unseen"] == 1
        assert fingerprint(module)["unseen_names"] is not None
    assert (whole["unseen"], whole["unseen_names"], whole["scheme"]) == (0, None, 2)


def test_a_run_reads_the_weights_once_and_one_that_goes_on_reads_them_anew(tmp_path):
    model, path = build(), tmp_path / "c"
    model.unused = nn.Parameter(torch.randn(300, 70))  # which no forward reads
    storage = model.unused.untyped_storage().data_ptr()
    options = {"checkpoint": path, "checkpoint_every": 1e-9}
    data = [torch.ones(1, 4, dtype=torch.long)] * 5
    written = set()

    def stop(tokens, total):
        if path.exists():
            written.add((path.stat().st_ino, path.stat().st_mtime_ns))
        if tokens >= 12:
            raise KeyboardInterrupt

    with Operators() as once:
        fingerprint(model)
    with Operators() as seen, pytest.raises(fastheads.errors.ProfileInterrupted):
        fastheads.profile(model, data, progress=stop, **options)
    assert len(written) > 1
    assert seen.given[storage] == once.given[storage] > 0
    with torch.no_grad():
        model.unused[3, 7] *= 1.5
    with pytest.raises(fastheads.errors.CheckpointError, match="model weights is not what it was"):
        fastheads.profile(model, data, resume=True, **options)
