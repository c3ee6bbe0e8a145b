"""Which launch parameters serve which GPU, head_dim, dtype and precision: a tuned table, and safe defaults beside it."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

INTERPRETED = "interpreted"  # stands for the compute capability under TRITON_INTERPRET=1
MAX_HEAD_DIM = 256
TABLE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Config:
    """Launch parameters of the kernel."""

    width: int  # of the blocks of L; a power of two
    block_tokens: int
    num_warps: int
    num_stages: int  # of the one-pass loop where there is one
    exact_stages: int  # of the two-pass loop
    side_by_side: bool = False  # both parts of L in one product twice as wide: fewer products, more registers
    tma: bool = False  # x by bulk copies where its rows lie evenly spaced
    together: bool = (
        False  # one reduction for the squares of z and of the product; bfloat16, pieces of one width
    )
    max_registers: int = 255  # a thread's; 65536 / (max_registers * threads) programs fit a multiprocessor

    def pieces(self, head_dim: int) -> tuple[int, ...]:
        """Widths of the column blocks of z: `width` each, the last as narrow as a power of two ≥ 16 allows."""
        full, rest = divmod(head_dim, self.width)
        last = () if rest == 0 else (max(16, 1 << (rest - 1).bit_length()),)
        return (self.width,) * full + last


def parts(head_dim: int, dtype: torch.dtype) -> int:
    """Parts of L: two of 8 bits, but three in small heads of a decaying spectrum a token may all but miss what is large."""
    return 3 if head_dim < 64 and dtype != torch.float16 else 2


def triangle_elements(pieces: tuple[int, ...]) -> int:
    """Elements in the blocks on and below the diagonal, one pass."""
    return sum(pieces[i] * pieces[j] for j in range(len(pieces)) for i in range(j, len(pieces)))


def shared_bytes(config: Config, head_dim: int, dtype: torch.dtype, precision: str) -> int:
    """Shared memory that the kernel holds at once: the stationary blocks and the buffers of x (an estimate)."""
    pieces = config.pieces(head_dim)
    one_pass = triangle_elements(pieces) * 2
    tile = config.block_tokens * sum(pieces) * dtype.itemsize
    exact = parts(head_dim, dtype) * one_pass + max(config.exact_stages - 1, 1) * tile
    fast = one_pass + max(config.num_stages - 1, 1) * tile
    return exact if precision == "exact" else max(exact, fast)


def programs_at_once(config: Config, head_dim: int, dtype: torch.dtype, precision: str) -> int:
    """Programs that a multiprocessor of 64K registers and 228 KB of shared memory holds."""
    registers = (64 << 10) // (config.max_registers * config.num_warps * 32)
    shared = (228 << 10) // (shared_bytes(config, head_dim, dtype, precision) + 2048)
    return max(1, min(registers, shared))


@lru_cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int | bool]]]]:
    return json.loads(TABLE.read_text())["configs"] if TABLE.exists() else {}


def default_config(head_dim: int, dtype: torch.dtype, precision: str, shared_limit: int) -> Config | None:
    """A configuration that fits `shared_limit` bytes per program, or None; for what is not in the table."""
    width = 64 if head_dim >= 128 else 32 if head_dim >= 64 else 16
    for block_tokens, stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2)):
        config = Config(width, block_tokens, 4, stages, 2)
        if shared_bytes(config, head_dim, dtype, precision) <= shared_limit - 4096:  # the rest: reductions
            return config
    return None


@lru_cache
def config_for(
    capability: str, head_dim: int, dtype: torch.dtype, precision: str, shared_limit: int
) -> Config | None:
    """The tuned configuration of (capability, head_dim, precision), a default, or None where nothing fits."""
    if capability == INTERPRETED:
        return Config(width=32 if head_dim >= 64 else 16, block_tokens=16, num_warps=4, num_stages=2,
                      exact_stages=2)  # fmt: skip
    if dtype != torch.float32:
        tuned = _table().get(capability, {}).get(str(head_dim), {}).get(precision)
        if tuned is not None:
            return Config(**tuned)  # type: ignore[arg-type]
    return default_config(head_dim, dtype, precision, shared_limit)
