"""Projections whose weight is not plainly dense, and what their formats define: unpacked in numpy, without the library.

The projections of transformers are filled by hand, where the release has them. Those of other packages are made where the package
is installed, else the test is skipped: none of them is small, or quick to set up (`pip install bitsandbytes torchao
optimum-quanto hqq`).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import build
from torch import nn

import fastheads

HIDDEN, WIDTH = 64, 256  # 4 heads of 64: one block of ggml's K formats, two of HQQ's and quanto's
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434
0.5626170039176941 0.7229568362236023 1.0"""
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
LEVELS = {"nf4": np.array(NF4.split(), dtype=np.float64), "fp4": np.concatenate([FP4, -FP4])}


def numpy(tensor):
    return tensor.detach().double().numpy()


def model_with(make, **changes):
    """A small Llama whose projections are `make(layer)`."""
    model = build(head_dim=64, intermediate_size=128, **changes)
    for layer, block in enumerate(model.model.layers):
        torch.manual_seed(layer)
        block.self_attn.o_proj = make(layer)
    return model


def projections(model):
    return [site.module for site in fastheads.find_sites(model)]


def linear(_layer=0):
    return nn.Linear(WIDTH, HIDDEN, bias=False)


def integration(name):
    """A module of transformers.integrations; the test is skipped where the release has none of that name."""
    return pytest.importorskip(
        f"transformers.integrations.{name}", reason="not in this release of transformers"
    )


def by_blocks(values, scales, size):
    return values * np.repeat(scales.ravel(), size)[: values.size].reshape(values.shape)


# ---------------------------------------------------------------- the forms: make(layer) -> module, dense(module) -> numpy


class Fp8:
    block = (48, 160)  # divides neither side

    def make(self, _layer):
        module = integration("finegrained_fp8").FP8Linear(WIDTH, HIDDEN, block_size=self.block)
        module.weight.data = torch.randn(HIDDEN, WIDTH).to(torch.float8_e4m3fn)
        module.weight_scale_inv.data = torch.rand_like(module.weight_scale_inv) + 0.5
        return module.requires_grad_(False)

    def dense(self, module):
        rows, columns = self.block or (HIDDEN, WIDTH)
        scale = np.atleast_2d(numpy(module.weight_scale_inv))
        weight = numpy(module.weight.float())
        return np.array(
            [[weight[i, j] * scale[i // rows, j // columns] for j in range(WIDTH)] for i in range(HIDDEN)]
        )

    def stand_in(self, monkeypatch):
        """Its kernel needs a GPU."""
        fp8 = integration("finegrained_fp8")
        if not hasattr(fp8, "fp8_linear"):  # older releases
            monkeypatch.setattr(
                fp8.FP8Linear, "forward", lambda m, x: x @ torch.tensor(self.dense(m), dtype=x.dtype).T
            )
            return
        monkeypatch.setattr(
            fp8,
            "fp8_linear",
            lambda x, weight, scale, block, bias, *_: (
                x
                @ torch.tensor(
                    self.dense(SimpleNamespace(weight=weight, weight_scale_inv=scale)), dtype=x.dtype
                ).T
            ),
        )

    changes = {
        "scales": lambda module: module.weight_scale_inv.mul_(2),
        "codes": lambda module: module.weight.copy_(torch.randn(HIDDEN, WIDTH).to(torch.float8_e4m3fn)),
        "a new scale": lambda module: setattr(
            module, "weight_scale_inv", nn.Parameter(module.weight_scale_inv * 3)
        ),
        "load_state_dict": lambda module: module.load_state_dict(
            {k: v.flip(0) if v.dim() else v * 2 for k, v in module.state_dict().items()}
        ),
    }
    behind = {"data of the scales": lambda module: module.weight_scale_inv.data.mul_(2)}


class Fp8OneScale(Fp8):
    block = None


class FbgemmFp8:
    def make(self, _layer):
        from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

        return self.filled(FbgemmFp8Linear(WIDTH, HIDDEN, False))

    def filled(self, module):
        module.weight.data = torch.randn(HIDDEN, WIDTH).to(torch.float8_e4m3fn)
        module.weight_scale.data = torch.rand_like(module.weight_scale) + 0.5
        return module.requires_grad_(False)

    def dense(self, module):
        return numpy(module.weight.float()) * numpy(module.weight_scale).reshape(HIDDEN, 1)

    def stand_in(self, monkeypatch):
        """Its kernel needs a GPU."""
        from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

        monkeypatch.setattr(
            FbgemmFp8Linear, "forward", lambda m, x: x @ torch.tensor(self.dense(m), dtype=x.dtype).T
        )

    changes = {"scales": lambda module: module.weight_scale.mul_(2)}
    behind = {"data of the scales": lambda module: module.weight_scale.data.mul_(2)}


class CompressedFp8(FbgemmFp8):
    def make(self, _layer):
        return self.filled(integration("compressed_tensors").CompressedTensorsFP8Linear(WIDTH, HIDDEN))

    stand_in = None


class Gguf:
    permuted = False

    def __init__(self, kind):
        self.kind = kind

    def make(self, _layer):
        gguf = pytest.importorskip("gguf", reason="GGUF needs the extra `demo`")
        kind = gguf.GGMLQuantizationType[self.kind]
        module = integration("gguf.utils").GgufLinear(WIDTH, HIDDEN, kind.value)
        if self.kind.endswith(
            "_K"
        ):  # gguf packs none of these: any bits will do, with halves that are finite
            data = torch.randint(0, 256, module.weight.shape, dtype=torch.uint8)
            halves = {"Q4_K": (0, 2), "Q6_K": (208,)}[self.kind]
            for start in halves:
                data[:, start : start + 2] = torch.tensor([0.01, 0.02]).half().view(torch.uint8)[:2]
        else:
            data = torch.from_numpy(
                np.ascontiguousarray(gguf.quants.quantize(np.random.randn(HIDDEN, WIDTH).astype("f4"), kind))
            )
        module.weight.data = data
        if self.permuted:
            module.input_permutation = torch.randperm(WIDTH)
        return module

    def dense(self, module):
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        dense = dequantize(module.weight.numpy(), GGMLQuantizationType[self.kind]).astype(np.float64)
        if self.permuted:  # y = W x[permutation]
            dense = dense @ np.eye(WIDTH)[module.input_permutation.numpy()]
        return dense

    changes = {
        "blocks": lambda module: module.weight.copy_(module.weight.roll(1, 0)),
        "a new weight": lambda module: setattr(
            module, "weight", nn.Parameter(module.weight.flip(0), requires_grad=False)
        ),
    }
    behind = {"data of the blocks": lambda module: module.weight.data.copy_(module.weight.roll(1, 0))}


class PermutedGguf(Gguf):
    permuted = True


class Bitnet:
    def make(self, _layer):
        from transformers.integrations.bitnet import BitLinear, pack_weights

        module = BitLinear(WIDTH, HIDDEN, bias=True, dtype=torch.float32)
        self.ternary = torch.randint(-1, 2, (HIDDEN, WIDTH)).float()
        module.weight.data = pack_weights(self.ternary.clone())
        module.weight_scale.data = torch.rand(1) + 2
        return module

    def dense(self, module):
        packed = module.weight.numpy()  # two bits each of four rows that are a quarter apart
        levels = np.concatenate([packed // 4**i % 4 for i in range(4)]).astype(np.float64) - 1
        return levels / numpy(module.weight_scale)

    changes = {
        "scale": lambda module: module.weight_scale.mul_(2),
        "codes": lambda module: module.weight.copy_(module.weight.flip(0)),
    }
    behind = {"data of the scale": lambda module: module.weight_scale.data.mul_(2)}


class AutoBitnet:
    def make(self, _layer):
        from transformers.integrations.bitnet import AutoBitLinear

        module = AutoBitLinear(WIDTH, HIDDEN, bias=False)
        module.weight_scale.data = torch.rand(1) + 2
        return module.requires_grad_(False)

    def dense(self, module):
        return numpy(module.weight) * numpy(module.weight_scale)

    changes = {
        "scale": lambda module: module.weight_scale.mul_(2),
        "weight": lambda module: module.weight.mul_(2),
    }
    behind = {"data of the weight": lambda module: module.weight.data.mul_(2)}


class OnlineBitnet:
    def make(self, _layer):
        from transformers.integrations.bitnet import AutoBitLinear

        return AutoBitLinear(WIDTH, HIDDEN, bias=False, online_quant=True).requires_grad_(False)

    def dense(self, module):
        weight = numpy(module.weight)
        scale = np.abs(weight).mean()
        return np.clip(np.round(weight / scale), -1, 1) * scale

    changes = {"weight": lambda module: module.weight.mul_(2)}
    behind = {"data of the weight": lambda module: module.weight.data.mul_(2)}


class Gemma:
    def __init__(self, bits):
        self.bits = bits

    def make(self, _layer):
        module = integration("gemma_quant").QuantizedLinear(WIDTH, HIDDEN, num_bits=self.bits)
        kind = torch.iinfo(module.weight.dtype)
        module.weight.data = torch.randint(
            kind.min, kind.max + 1, module.weight.shape, dtype=module.weight.dtype
        )
        module.weight_scale.data = torch.rand(HIDDEN, 1) + 0.5
        return module.requires_grad_(False)

    def dense(self, module):
        codes = module.weight.numpy().astype(np.int64)
        if self.bits < 8:
            levels = 2**self.bits
            codes = np.stack([codes // levels**i % levels for i in range(8 // self.bits)], axis=-1)
            codes = codes.reshape(HIDDEN, WIDTH) - levels // 2
        return codes * numpy(module.weight_scale)

    changes = {
        "scales": lambda module: module.weight_scale.mul_(2),
        "codes": lambda module: module.weight.copy_(module.weight.flip(0)),
    }
    behind = {"data of the scales": lambda module: module.weight_scale.data.mul_(2)}


class Quanto:
    """Its first use compiles an extension, which takes a minute."""

    def __init__(self, kind):
        self.kind = kind

    def make(self, _layer):
        quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed")
        module = quanto.QLinear.from_module(linear(), weights=self.kind)
        module.freeze()
        return module

    def dense(self, module):
        weight = module.weight
        if hasattr(weight, "_shift"):  # blocks of 128 along the rows, in one column each
            codes = numpy_of_packed(weight._data).astype(np.float64)
            return (codes * numpy(weight._scale) - numpy(weight._shift)).reshape(HIDDEN, WIDTH)
        return numpy(weight._data.float()) * numpy(weight._scale)

    def frozen_again(module):
        other = type(module).from_module(linear(), weights=module.weight_qtype)
        other.freeze()
        module.weight = other.weight

    changes = {
        "scales": lambda module: module.weight._scale.mul_(2),
        "a new weight": frozen_again,
    }
    behind = {"data of the scales": lambda module: module.weight._scale.data.mul_(2)}


def numpy_of_packed(packed):
    """Codes of quanto's PackedTensor: the rows lie behind one another, `bits` at a time."""
    data, bits = packed._data.numpy(), packed._bits
    parts = [data >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    return np.concatenate(parts)[: packed.shape[0]]


class Hqq:
    def __init__(self, bits):
        self.bits = bits

    def make(self, _layer):
        hqq = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")
        config = hqq.BaseQuantizeConfig(nbits=self.bits, group_size=64)
        return hqq.HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")

    def dense(self, module):
        packed, bits = module.W_q.numpy(), self.bits
        shifts = [8 - bits * (i + 1) for i in range(8 // bits)]  # the upper bits are the first rows
        codes = np.concatenate([packed >> s & (2**bits - 1) for s in shifts]).astype(np.float64)
        return ((codes - numpy(module.meta["zero"])) * numpy(module.meta["scale"])).reshape(HIDDEN, WIDTH)

    changes = {
        "scales": lambda module: module.meta["scale"].mul_(2),
        "other zeros": lambda module: module.meta.update(zero=module.meta["zero"] + 1),
        "codes": lambda module: module.W_q.copy_(module.W_q.flip(0)),
    }
    behind = {"data of the scales": lambda module: module.meta["scale"].data.mul_(2)}


class Torchao:
    def __init__(self, config, **options):
        self.config, self.options = config, options

    def make(self, _layer):
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        module, config = linear(), self.configured(torchao)
        torchao.quantize_(module, config)
        return module

    def configured(self, torchao):
        options = dict(self.options)
        if "weight_dtype" in options:
            options["granularity"] = torchao.PerGroup(32)
        return getattr(torchao, self.config)(**options)

    def dense(self, module):
        weight = module.weight
        if type(weight) is nn.Parameter:
            return numpy(weight)
        codes = numpy(weight.qdata.float())
        scale = numpy(weight.scale)
        zero = weight.zero_point.numpy() if getattr(weight, "zero_point", None) is not None else 0 * scale
        size = WIDTH // scale.shape[1]
        return (codes - np.repeat(zero, size, axis=1)) * np.repeat(scale, size, axis=1)

    changes = {
        "scales": lambda module: module.weight.scale.mul_(2),
        "codes": lambda module: module.weight.qdata.copy_(module.weight.qdata.flip(0)),
        "a new weight": lambda module: setattr(
            module, "weight", nn.Parameter(torch.randn(HIDDEN, WIDTH), requires_grad=False)
        ),
    }
    behind = {"data of the scales": lambda module: module.weight.scale.data.mul_(2)}


class Bnb4:
    def __init__(self, kind, nested):
        self.kind, self.nested = kind, nested

    def make(self, _layer):
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        module = bnb.nn.Linear4bit(
            WIDTH, HIDDEN, bias=False, quant_type=self.kind, compress_statistics=self.nested
        )
        return module.to("cpu").eval()

    def dense(self, module):
        """Of the layout before the first forward; what CPUs round as they repack it is rounded."""
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return self.seen[id(module)]
        packed = module.weight.numpy().ravel()
        levels = np.stack([packed // 16, packed % 16], axis=-1).ravel()
        absmax = state.absmax.numpy() if state.nested else state.absmax.float().numpy()
        if state.nested:
            inner = state.state2
            absmax = by_blocks(inner.code.numpy()[absmax], inner.absmax.numpy(), inner.blocksize)
            absmax = absmax + state.offset.numpy()
        if module.support_avx512bf16_for_cpu and not module.training:
            absmax = torch.from_numpy(np.float32(absmax)).bfloat16().float().numpy()
        dense = by_blocks(LEVELS[self.kind][levels], np.float64(absmax), state.blocksize)
        self.seen[id(module)] = dense.reshape(state.shape)
        return self.seen[id(module)]

    seen = {}

    def requantized(module):
        with torch.random.fork_rng():
            other = type(module)(WIDTH, HIDDEN, bias=False, quant_type=module.weight.quant_type).to("cpu")
        module.weight, module.quant_state = other.weight, other.quant_state

    changes = {
        "a new weight": requantized,
        "repacking taken back": lambda module: module.state_dict(),  # which is not exact
    }
    behind = {"data of the scales": lambda module: module.weight.quant_state.absmax.data.neg_()}


class Bnb8:
    threshold = 0.0

    def make(self, _layer):
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        module = bnb.nn.Linear8bitLt(
            WIDTH, HIDDEN, bias=False, has_fp16_weights=False, threshold=self.threshold
        )
        return module.to("cpu").eval()

    def dense(self, module):
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return module.weight.numpy().astype(np.float64) * numpy(scales)[:, None] / 127

    changes = {
        "scales": lambda module: module.state.SCB.mul_(2),
        "codes": lambda module: module.weight.copy_(module.weight.flip(0)),
    }
    behind = {"data of the scales": lambda module: module.state.SCB.data.mul_(2)}


class Bnb8Outliers(Bnb8):
    threshold = 0.5


FORMS = {
    "fp8 in blocks": Fp8(),
    "fp8 with one scale": Fp8OneScale(),
    "fbgemm fp8": FbgemmFp8(),
    "compressed-tensors fp8": CompressedFp8(),
    **{f"gguf {kind}": Gguf(kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")},
    "gguf permuted": PermutedGguf("Q8_0"),
    "bitnet": Bitnet(),
    "bitnet offline": AutoBitnet(),
    "bitnet online": OnlineBitnet(),
    **{f"gemma int{bits}": Gemma(bits) for bits in (2, 4, 8)},
    **{f"quanto {kind}": Quanto(kind) for kind in ("qint8", "qint4", "qint2", "qfloat8")},
    **{f"hqq {bits} bits": Hqq(bits) for bits in (8, 4, 2)},
    "torchao int8": Torchao("Int8WeightOnlyConfig"),
    "torchao int8, dynamic": Torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 in int8": Torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": Torchao("Float8WeightOnlyConfig"),
    **{
        f"bitsandbytes {kind}{', nested' * nested}": Bnb4(kind, nested)
        for kind in LEVELS
        for nested in (False, True)
    },
    "bitsandbytes int8": Bnb8(),
    "bitsandbytes int8, outliers": Bnb8Outliers(),
}


def dense_weights(model, form):
    """The weights of the model's projections, by their format."""
    return [torch.from_numpy(form.dense(module)) for module in projections(model)]
