"""The factor as the kernel reads it: split into parts of the input's dtype, scaled, its triangle packed in blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config, parts, triangle_elements
from .kernel import TICKET_BYTES

PRECISIONS = ("exact", "fast")
# One pass serves a head only where no token at all can be wrong by more than this. The worst token is one that adds up all
# roundings of the head; of tokens that do not know them, the worst of a million is wrong by a third to a half as much.
WORST_TOKEN = 4e-3
_HEADS_AT_A_TIME = 16  # float64 [heads, D, D] temporaries: 8 MB each at D = 256
# fp16 has few exponents: the largest element of a head goes just under the top, so that small ones stay normal.
_TOP_EXPONENT = {torch.float16: 14, torch.bfloat16: 0, torch.float32: 0}


@dataclass(eq=False)
class KernelFactor:
    """L of all heads of one layer on one device, in one buffer whose address never changes.

    Bytes: a ticket (128), float32 scale [heads], int32 flag [heads] (1: two passes), int32 ticket [heads], padding to 128, then
    the blocks [heads, elements] in `part_dtype`, a row of the high part of a block followed by the same row of the low parts.
    With s the scale, s (high + low + ...) is L Q to the rounding of the parts; Q is orthogonal (1, or `rotation` in one pass).
    Launches that share a factor share its ticket: a stream must order them.
    """

    buffer: Tensor  # uint8
    heads: int
    head_dim: int
    dtype: torch.dtype  # of x
    precision: str
    config: Config

    @property
    def pieces(self) -> tuple[int, ...]:
        return self.config.pieces(self.head_dim)

    @property
    def parts(self) -> int:
        return parts(self.head_dim, self.dtype)

    @property
    def part_dtype(self) -> torch.dtype:
        return part_dtype(self.dtype)

    def two_passes(self) -> Tensor:
        """Which heads are computed with both parts, bool `[heads]`."""
        start = int(TICKET_BYTES.value) + 4 * self.heads
        return self.buffer[start : start + 4 * self.heads].view(torch.int32) != 0

    def refresh(self, L: Tensor) -> None:
        """Write new factors `[heads, D, D]` into the same memory: what a CUDA graph captured follows. Never waits."""
        write_factor(self, L)


def part_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of L. float32 is split into bfloat16, whose exponents reach as far."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def buffer_bytes(heads: int, pieces: tuple[int, ...], count: int) -> int:
    return header_bytes(heads) + heads * count * triangle_elements(pieces) * 2


def header_bytes(heads: int) -> int:
    """Bytes before the blocks."""
    return int(TICKET_BYTES.value) + -(-heads * 12 // 128) * 128


def new_factor(L: Tensor, dtype: torch.dtype, precision: str, config: Config) -> KernelFactor:
    """Allocate and fill."""
    heads, head_dim, _ = L.shape
    with torch.inference_mode(False):
        size = buffer_bytes(heads, config.pieces(head_dim), parts(head_dim, dtype))
        buffer = torch.zeros(size, dtype=torch.uint8, device=L.device)
    factor = KernelFactor(buffer, heads, head_dim, dtype, precision, config)
    write_factor(factor, L)
    return factor


@torch.no_grad()
def write_factor(factor: KernelFactor, L: Tensor) -> None:
    """Split L and write it; asynchronous on a GPU."""
    heads, pieces = factor.heads, factor.pieces
    shape = (heads, factor.head_dim, factor.head_dim)
    if tuple(L.shape) != shape or L.dtype != torch.float64:
        raise ValueError(f"expected float64 {list(shape)}, got {L.dtype} {list(L.shape)}")
    start = int(TICKET_BYTES.value)
    scale = factor.buffer[start : start + 4 * heads].view(torch.float32)
    flag = factor.buffer[start + 4 * heads : start + 8 * heads].view(torch.int32)
    blocks = factor.buffer[header_bytes(heads) :].view(factor.part_dtype).view(heads, -1)
    columns = sum(pieces)
    for a in range(0, heads, _HEADS_AT_A_TIME):
        part = slice(a, a + _HEADS_AT_A_TIME)
        chunk = L[part]
        power = scale_of(chunk, factor.dtype)
        # Zero columns beyond D change no norm; zero rows meet the zeros that the kernel puts there.
        scaled = torch.nn.functional.pad(chunk / power[:, None, None], (0, columns - factor.head_dim))
        if factor.precision == "fast":
            turned = scaled @ rotation(pieces, L.device)
            rounded = turned.to(factor.part_dtype).double() * power[:, None, None]
            wrong = ~(worst_error(chunk, rounded) <= WORST_TOKEN)  # NaN counts as wrong
            scaled = torch.where(wrong[:, None, None], scaled, turned)
            flag[part] = wrong.to(torch.int32)
        else:
            flag[part] = 1
        scale[part] = power.float()
        split = []
        for _ in range(factor.parts):
            split.append(scaled.to(factor.part_dtype))
            scaled = scaled - split[-1].double()
        blocks[part] = pack(split, pieces)


def scale_of(L: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two `[heads]` that move the largest element of each head to a fixed exponent."""
    largest = L.abs().amax((-2, -1))
    usable = largest.isfinite() & (largest > 0)
    _, exponent = torch.frexp(torch.where(usable, largest, 1.0))
    return torch.ldexp(torch.ones_like(largest), (exponent - _TOP_EXPONENT[dtype]).clamp(-126, 126))


def rotation(pieces: tuple[int, ...], device: torch.device) -> Tensor:
    """An orthogonal matrix that mixes the columns of each piece: the cosine transform of type IV.

    |z L Q| = |z L|, and L Q has zeros where L has zero blocks. L is nearly diagonal where W is well-conditioned, so that one
    rounding decides how long a token in one direction becomes: an error of 4e-3, and a bias. In L Q every direction
    sums over a whole piece of roundings that know nothing of each other.
    """
    blocks = []
    for width in pieces:
        k = torch.arange(width, dtype=torch.float64, device=device) + 0.5
        blocks.append((2 / width) ** 0.5 * torch.cos(math.pi / width * k[:, None] * k[None, :]))
    return torch.block_diag(*blocks)


def worst_error(L: Tensor, rounded: Tensor) -> Tensor:
    """The largest relative error of |z M| for |z L| over all z, `[heads]`, from above; M is `rounded`.

    |z M|² / |z L|² - 1 lies between the extreme eigenvalues of E = X Xᵀ - 1, X = L⁻¹ M. Their size is at most
    |E^64|_F^(1/64), at most 1.05 times too large at D = 256, and needs no eigenvalue solver (which would wait for the GPU).
    """
    ratio = torch.linalg.solve_triangular(L, rounded, upper=False)
    error = ratio @ ratio.mT
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    bound = torch.zeros(L.shape[0], dtype=torch.float64, device=L.device)
    for doubling in range(7):
        # Of E^(2^doubling), less the factors taken out. The bound keeps E = 0 from 0/0; NaN passes through.
        size = error.square().sum((-2, -1)).sqrt().clamp(min=1e-300)
        bound = bound + size.log() / 2**doubling
        error = error / size[:, None, None]
        if doubling < 6:
            error = error @ error
    bound = bound.exp()
    # sqrt(1 + e) - 1 and 1 - sqrt(1 - e): the second is the larger.
    return 1.0 - (1.0 - bound).clamp(min=0.0).sqrt()


def pack(split: Sequence[Tensor], pieces: tuple[int, ...]) -> Tensor:
    """The blocks [I, J], I ≥ J, of parts `[heads, D, columns]`, column by column: `[heads, elements]`.

    A block is row-major [I's width, parts, J's width], zero in rows beyond D: one product with two parts is both at once.
    """
    both = torch.stack(tuple(split), dim=-2)  # [heads, D, parts, columns]
    both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, sum(pieces) - both.shape[1]))
    edges = [sum(pieces[:i]) for i in range(len(pieces) + 1)]
    return torch.cat(
        [
            both[:, edges[i] : edges[i + 1], :, edges[j] : edges[j + 1]].flatten(1)
            for j in range(len(pieces))
            for i in range(j, len(pieces))
        ],
        dim=1,
    )
