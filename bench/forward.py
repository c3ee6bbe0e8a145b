"""What a profiled forward costs beside the plain one: `python bench/forward.py [--json FILE]`.

Plain and profiled forwards alternate (A B A B) in one process; the figure is the median over pairs of hooked/plain - 1, with
its quartiles. Before any time is taken each backend's means are compared with float64 algebra over captured inputs.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastheads
from fastheads.loading import find_model, load_model

GATE = 2e-5  # relative; the float32 products of a float32 model stay well inside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=None, help="local folder, GGUF file or Hub id (default: SmolLM2-135M)"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9, help="plain/profiled pairs for each backend")
    parser.add_argument("--token-agg", default="all", choices=["last", "all", "token"])
    parser.add_argument("--backends", nargs="+", default=["factored", "einsum", "loop"])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = load_model(find_model(options.model), device="cpu", dtype="float32")
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.seq))
    for backend in options.backends:
        correctness_gate(model, backend, options.token_agg)

    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    rows = [overhead(model, forward, b, options.token_agg, options.pairs) for b in options.backends]
    report = {"machine": machine(options.threads), "case": case(model, options), "rows": rows}
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


@torch.inference_mode()
def correctness_gate(model: nn.Module, backend: str, token_agg: str) -> None:
    """Exits where a mean differs from float64 algebra by more than GATE."""
    sites = fastheads.find_sites(model)
    inputs: list[Tensor] = []
    ids = torch.randint(0, model.config.vocab_size, (2, 33))  # type: ignore[union-attr, arg-type]
    handles = [
        s.module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].double())) for s in sites
    ]
    with fastheads.HookManager(model, token_agg, backend=backend) as hooks:
        model(input_ids=ids)
        got = hooks.get_results()["head_residual_contribution_norm"]["mean"]
    for handle in handles:
        handle.remove()
    worst = 0.0
    for row, (site, x) in enumerate(zip(sites, inputs, strict=True)):
        z = x.unflatten(-1, (site.num_heads, site.head_dim))
        z = z[:, -1:] if token_agg == "last" else z
        w = site.module.weight.double().unflatten(-1, (site.num_heads, site.head_dim))  # type: ignore[operator, union-attr]
        want = torch.einsum("bshd,ohd->bsho", z, w).norm(dim=-1).mean(dim=(0, 1))
        worst = max(worst, float(((got[row, : site.num_heads] - want).abs() / want).max()))
    print(f"{backend}: largest relative error of a mean {worst:.1e}")
    if not worst <= GATE:
        sys.exit(f"{backend} is wrong: no time is worth taking")


def overhead(
    model: nn.Module, forward: Callable[[], None], backend: str, token_agg: str, pairs: int
) -> dict[str, Any]:
    """Times of plain and profiled forwards in turn."""
    plain, profiled = [], []
    with torch.inference_mode():
        for pair in range(-1, pairs):  # the first pair warms up
            a = timed(forward)
            with fastheads.HookManager(model, token_agg, backend=backend):
                b = timed(forward)
            if pair >= 0:
                plain.append(a)
                profiled.append(b)
    ratios = [b / a - 1 for a, b in zip(plain, profiled, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "backend": backend,
        "plain_s": statistics.median(plain),
        "profiled_s": statistics.median(profiled),
        "overhead": middle,
        "quartiles": [low, high],
        "pairs": pairs,
    }


def timed(forward: Callable[[], None]) -> float:
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def machine(threads: int) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "fastheads": fastheads.__version__,
    }


def case(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": str(next(model.parameters()).dtype),
        "batch": options.batch,
        "seq": options.seq,
        "token_agg": options.token_agg,
    }


def show(report: dict[str, Any]) -> None:
    c, m = report["case"], report["machine"]
    print(
        f"\n{c['model']}, {c['dtype']}, {c['batch']} x {c['seq']} tokens, {c['token_agg']}, {m['threads']} threads, torch {m['torch']}"
    )
    print(f"{'backend':10} {'plain':>9} {'profiled':>9} {'overhead':>9}   quartiles")
    for row in report["rows"]:
        low, high = row["quartiles"]
        print(
            f"{row['backend']:10} {row['plain_s'] * 1e3:7.0f}ms {row['profiled_s'] * 1e3:7.0f}ms "
            f"{row['overhead']:9.1%}   {low:.1%} to {high:.1%}"
        )


if __name__ == "__main__":
    main()
