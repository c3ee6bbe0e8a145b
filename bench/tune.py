"""Regenerate the kernel's table of launch parameters on the GPU at hand: `python bench/tune.py --write`.

Every candidate is checked against float64 before it is timed; a wrong one, or one that does not compile, is reported and dropped.
`--log FILE` keeps all the times.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.language as tl
from fastheads.kernels import Config, KernelFactor, factor, head_stats, prepare
from fastheads.kernels.config import shared_bytes
from torch import Tensor

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "head_stats" / "tuned.json"
# heads and rows of 4096 tokens that make x larger than 300 MB, far beyond any L2
SHAPES = {
    64: (32, 32),
    80: (32, 16),
    96: (32, 16),
    112: (32, 12),
    128: (32, 16),
    192: (16, 16),
    256: (16, 16),
}
SEQ = 4096
HIDDEN = 4096
MEAN = 2  # plane of the state
TOLERANCE = {"exact": 5e-6, "fast": 2e-4}  # of the means


def candidates(head_dim: int, precision: str) -> Iterator[Config]:
    """Launch parameters worth trying; those that do not compile drop out."""
    widths = {64: (64, 32), 96: (32, 64), 256: (64, 128)}.get(head_dim, (64,))
    exact = precision == "exact"
    shapes: tuple[tuple[int, int, int], ...] = (
        (128, 8, 128),
        (64, 4, 168),
        (64, 4, 128),
        (128, 4, 255),
        (128, 4, 168),
    )
    if head_dim > 128:
        shapes = ((64, 8, 128), (64, 8, 255), (64, 4, 255), (128, 8, 255), (128, 8, 224))
    elif head_dim == 64:
        shapes = ((128, 8, 128), (64, 4, 128), (64, 4, 96), (128, 4, 168), (128, 4, 128))
    for width in widths:
        for block_tokens, num_warps, registers in shapes:
            for stages in (2, 3) if head_dim > 128 else (3, 4):
                for tma in (False, True) if head_dim > 128 or head_dim == 80 else (False,):
                    for side_by_side in (True, False) if exact and head_dim == 64 else (exact,):
                        for together in (
                            (False, True) if head_dim == 128 or (head_dim == 64 and not exact) else (False,)
                        ):
                            config = Config(
                                width, block_tokens, num_warps, stages, stages if exact else 2, side_by_side, tma, together,
                                registers,
                            )  # fmt: skip
                            if shared_bytes(config, head_dim, torch.bfloat16, precision) < 226 << 10:
                                yield config


def new_state(heads: int) -> Tensor:
    state = torch.zeros(6, 4, 1, heads, dtype=torch.float64, device="cuda")
    state[4] = math.inf
    state[5] = -math.inf
    return state


def random_factor(heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """W `[heads, hidden, D]` and L `[heads, D, D]`, float64, as of a bfloat16 model."""
    generator = torch.Generator("cuda").manual_seed(head_dim)
    weights = torch.randn(heads, HIDDEN, head_dim, device="cuda", generator=generator).bfloat16().double()
    return weights, torch.linalg.cholesky(weights.mT @ weights)


def true_means(x: Tensor, weights: Tensor) -> Tensor:
    """Means over the batch of the four metrics of "all", `[4, heads]`, from W itself in float64."""
    heads, _, head_dim = weights.shape
    samples = torch.empty(2, x.shape[0], heads, dtype=torch.float64, device=x.device)
    for h in range(heads):
        z = x[..., h * head_dim : (h + 1) * head_dim].double()
        samples[0, :, h] = z.norm(dim=-1).mean(-1)
        for b in range(x.shape[0]):
            samples[1, b, h] = (z[b] @ weights[h].mT).norm(dim=-1).mean()
    return torch.cat((samples, samples / samples.mean(-1, keepdim=True))).mean(1)


def graph_ms(call: Callable[[], object], calls: int = 6, repeats: int = 9) -> float:
    """Median time of a call on the GPU, from replays of a graph of several: no launch gaps."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[repeats // 2]


def compile_one(job: tuple[int, str, Config]) -> str | None:
    """Fill the compiler's cache in a worker process; the error where it does not compile."""
    head_dim, precision, config = job
    try:
        # The padded number of heads is a constant of the kernel: that of the timed shape.
        heads = SHAPES[head_dim][0]
        L = torch.eye(head_dim, dtype=torch.float64, device="cuda").repeat(heads, 1, 1)
        x = torch.randn(1, 4 * config.block_tokens, heads * head_dim, device="cuda").bfloat16()
        made = prepare(L, torch.bfloat16, precision, config=config)
        head_stats([x], [made], new_state(heads), [0], token_agg="all")
        torch.cuda.synchronize()
    except Exception as error:  # any failure of the compiler means: not this one
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:150] if str(error).strip() else ''}"
    return None


@triton.jit
def read_kernel(x, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fastest read we know: each program takes the maximum of one stretch."""
    i = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for r in tl.static_range(ROUNDS):
        best = tl.maximum(best, tl.load(x + (i * ROUNDS + r) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32))
    tl.store(out + i, tl.max(best, axis=0))


def read_ceiling(x: Tensor) -> float:
    """Bytes per second at which this GPU reads x: the best of several sizes."""
    out = torch.empty(x.numel() // 2048, device=x.device)
    times = []
    for block, rounds, warps in ((8192, 1, 8), (8192, 4, 8), (2048, 8, 4), (4096, 4, 4)):
        grid = (x.numel() // (block * rounds),)
        times.append(graph_ms(partial(read_kernel[grid], x, out, block, rounds, num_warps=warps)))
    return x.nbytes / min(times) * 1e3


def tune(head_dim: int, precision: str, pool: ProcessPoolExecutor) -> list[dict[str, object]]:
    heads, batch = SHAPES[head_dim]
    weights, L = random_factor(heads, head_dim)
    x = torch.randn(batch, SEQ, heads * head_dim, device="cuda", dtype=torch.bfloat16)
    truth = true_means(x, weights)
    ceiling = read_ceiling(x)
    configs = list(candidates(head_dim, precision))
    errors = list(pool.map(compile_one, [(head_dim, precision, config) for config in configs]))
    rows = []

    def measure(config: Config) -> None:
        made = prepare(L, torch.bfloat16, precision, config=config)
        rows.append(time_one(x, made, truth, ceiling, precision))

    for config, error in zip(configs, errors, strict=True):
        if error is None:
            measure(config)
        else:
            rows.append({"config": asdict(config), "error": error})
    for row in sorted(rows, key=lambda row: float(str(row.get("ms", math.inf)))):
        print(head_dim, precision, describe(row), flush=True)
    return [{"head_dim": head_dim, "precision": precision, "ceiling": ceiling} | row for row in rows]


def time_one(
    x: Tensor, made: KernelFactor, truth: Tensor, ceiling: float, precision: str
) -> dict[str, object]:
    state = new_state(made.heads)
    row: dict[str, object] = {"config": asdict(made.config)}
    try:
        head_stats([x], [made], state, [0], token_agg="all")
        torch.cuda.synchronize()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[-150:]}"}
    off_by = ((state[MEAN, :, 0] - truth).abs() / truth).max().item()
    if not off_by <= TOLERANCE[precision]:
        return row | {"error": f"wrong by {off_by:.1e}", "two_passes": int(made.two_passes().sum())}
    ms = graph_ms(lambda: head_stats([x], [made], state, [0], token_agg="all"))
    rate = x.nbytes / ms * 1e3
    return row | {
        "ms": ms, "tb_s": rate / 1e12, "of_ceiling": rate / ceiling, "off_by": off_by,
        "two_passes": int(made.two_passes().sum()),
    }  # fmt: skip


def describe(row: dict[str, object]) -> str:
    c = Config(**row["config"])  # type: ignore[arg-type]
    text = (
        f"width {c.width:3} tokens {c.block_tokens:3} warps {c.num_warps} stages {c.num_stages}/{c.exact_stages} "
        f"wide {c.side_by_side:d} tma {c.tma:d} together {c.together:d} regs {c.max_registers}: "
    )
    if "error" in row:
        return text + str(row["error"])
    return (
        text
        + f"{row['ms']:.3f} ms {row['tb_s']:.2f} TB/s {row['of_ceiling']:.1%} off by {row['off_by']:.0e} "
        f"({row['two_passes']} heads exact)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="*", default=list(SHAPES))
    parser.add_argument("--precisions", nargs="*", default=["exact", "fast"])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--write", action="store_true", help="write the best of each to the table")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing after this long")
    parser.add_argument(
        "--any-error", action="store_true", help="fast: one pass for every head, for comparison"
    )
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.any_error:
        factor.WORST_TOKEN = 1.0
        TOLERANCE["fast"] = 1e-3
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"configs": {}}
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for head_dim in arguments.head_dims:
            for precision in arguments.precisions:
                if time.monotonic() - began > arguments.seconds:
                    continue
                new = tune(head_dim, precision, pool)
                rows += new
                best = min((row for row in new if "ms" in row), key=lambda row: float(str(row["ms"])))
                table["configs"].setdefault(capability, {}).setdefault(str(head_dim), {})[precision] = best[
                    "config"
                ]
                print(f"  {time.monotonic() - began:.0f} s", flush=True)
                if arguments.log:
                    arguments.log.write_text(
                        json.dumps({"gpu": properties.name, "rows": rows}, indent=1) + "\n"
                    )
    if arguments.write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
