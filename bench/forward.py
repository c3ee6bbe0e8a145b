"""What a profiled forward costs beside the plain one.

    python bench/forward.py                 # SmolLM2 on the CPU
    python bench/forward.py --gpu           # Llama shapes with random weights, eager and compiled

Plain and profiled forwards alternate in one process (A B, B A); the figure is the median over pairs of profiled/plain - 1, with
its quartiles. Before any time is taken each backend's means are compared with float64 algebra over captured inputs. `--json FILE`
writes what is printed.
"""

import argparse
import contextlib
import copy
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from seed_attention import RecomputingManager
from torch import Tensor, nn

import fastheads
from fastheads.capture.projection_hook import SITE_ATTRIBUTE
from fastheads.run.loading import find_model, load_model

GATE = 2e-5  # relative; what float32 products of a few hundred terms stay well inside

# hidden, MLP, layers, heads, KV heads, vocabulary; head_dim is 128, or 64 in the 1B model
SHAPES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b, 8 layers": (8192, 28672, 8, 64, 8, 128256),
}
# Measured where it is asked for: its layers normalize what the heads add, so that a second product follows each projection.
NORMED = {"gemma-2-2b": (2304, 9216, 26, 8, 4, 256000)}
CASES = [(1, 1), (1, 128), (8, 128), (32, 128), (8, 2048)]  # batch, seq
MODES = {"eager": None, "compiled": "default", "reduce-overhead": "reduce-overhead"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="Llama shapes on the GPU")
    parser.add_argument(
        "--model", default=None, help="CPU: local folder, GGUF file or Hub id (default: SmolLM2)"
    )
    parser.add_argument("--cases", nargs="+", default=None, help="batch x seq, such as 4x256")
    parser.add_argument("--threads", type=int, default=2, help="CPU")
    parser.add_argument(
        "--pairs",
        type=int,
        default=None,
        help="plain/profiled pairs (default: 9 on the CPU; 41, or 9 where a forward takes over 100 ms)",
    )
    parser.add_argument("--token-aggs", nargs="+", default=None, choices=["last", "all", "token"])
    parser.add_argument(
        "--backends", nargs="+", default=None, help="seed: the older manager of the seed note"
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=[*SHAPES, *NORMED], help="GPU")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="GPU")
    parser.add_argument("--masked", action="store_true", help="with an attention mask, as in generate()")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(
        "--append",
        action="store_true",
        help="beside what is there of the same kind of machine, in place of the same cases",
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    here = machine(options)
    report = {"machine": here, "rows": rows}
    if options.append and options.json and options.json.exists():
        rows += rows_before(json.loads(options.json.read_text()), here, options.json)
    for row in (gpu_rows if options.gpu else cpu_rows)(options):
        print(line(row), flush=True)
        rows[:] = [other for other in rows if case_of(other) != case_of(row)] + [row]
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


def rows_before(report: dict[str, Any], here: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier report, each with its commit and day. Exits where the machine is another."""
    there = report["machine"]
    told = {key: there[key] for key in ("commit", "date")}
    if {k: v for k, v in there.items() if k not in told} != {k: v for k, v in here.items() if k not in told}:
        sys.exit(f"{path} holds the figures of another kind of machine: {there}")
    return [row if told["commit"] == here["commit"] else told | row for row in report["rows"]]


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is measured of."""
    keys = ("model", "dtype", "mode", "backend", "token_agg", "batch", "seq")
    return (*[row[key] for key in keys], row.get("masked", False))


def cpu_rows(options: argparse.Namespace) -> Any:
    torch.set_num_threads(options.threads)
    model = load_model(find_model(options.model), device="cpu", dtype="float32")
    name = options.model or "SmolLM2-135M-Instruct"
    for backend in options.backends or ["factored", "einsum", "loop"]:
        for token_agg in options.token_aggs or ["all"]:
            error = correctness_gate(model, backend, token_agg)
            for batch, seq in cases(options, [(4, 256)]):
                row = {
                    "model": name,
                    "dtype": "float32",
                    "mode": "eager",
                    "backend": backend,
                    "token_agg": token_agg,
                }
                row |= {"batch": batch, "seq": seq, "gate": error} | masked(options)
                yield row | measure(model, model, row, options.pairs)


def gpu_rows(options: argparse.Namespace) -> Any:
    for shape in options.shapes:
        model = random_llama(shape)
        for backend in options.backends or ["auto"]:
            for token_agg in options.token_aggs or ["last", "all"]:
                error = None if backend == "seed" else correctness_gate(model, backend, token_agg)
                for mode in options.modes:
                    torch._dynamo.reset()
                    for batch, seq in cases(options, CASES):
                        row = {"model": shape, "dtype": "bfloat16", "mode": mode, "backend": backend}
                        row |= {"token_agg": token_agg, "batch": batch, "seq": seq, "gate": error}
                        row |= masked(options)
                        # Compiled, a twin that shares the weights: each attaching would make the compiler start again.
                        twin = model if mode == "eager" else sharing_twin(model)
                        yield row | measure(model, twin, row, options.pairs)
                        del twin
        del model
        gc.collect()
        torch.cuda.empty_cache()


def cases(options: argparse.Namespace, default: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if options.cases is None:
        return default
    return [(int(b), int(s)) for b, s in (case.split("x") for case in options.cases)]


def random_llama(shape: str) -> Any:
    """A model of that shape on the GPU, bfloat16, with random weights."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = (SHAPES | NORMED)[shape]
    kind = transformers.Gemma2Config if shape in NORMED else transformers.LlamaConfig
    config = kind(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        head_dim=256 if shape in NORMED else hidden // heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def sharing_twin(model: nn.Module) -> Any:
    """A copy of the modules over the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(t): t for t in shared})


@torch.inference_mode()
def correctness_gate(model: Any, backend: str, token_agg: str) -> float:
    """The largest relative error of a mean contribution; exits where it is above GATE."""
    sites = fastheads.find_sites(model)
    inputs: list[Tensor] = []
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (2, 33), device=device)
    handles = [
        s.module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].double())) for s in sites
    ]
    with fastheads.HookManager(model, token_agg, backend=backend) as hooks:
        model(input_ids=ids, use_cache=False)
        got = hooks.get_results()["head_residual_contribution_norm"]["mean"]
    for handle in handles:
        handle.remove()
    worst = 0.0
    for row, (site, x) in enumerate(zip(sites, inputs, strict=True)):
        z = x.unflatten(-1, (site.num_heads, site.head_dim))
        z = z[:, -1:] if token_agg == "last" else z
        w = site.module.weight.double().unflatten(-1, (site.num_heads, site.head_dim))  # type: ignore[operator, union-attr]
        want = torch.einsum("bshd,ohd->bsho", z, w).norm(dim=-1).mean(dim=(0, 1)).cpu()
        worst = max(worst, float(((got[row, : site.num_heads] - want).abs() / want).max()))
    if not worst <= GATE:
        sys.exit(f"{backend} is wrong by {worst:.1e} relative: no time is worth taking")
    return worst


def masked(options: argparse.Namespace) -> dict[str, Any]:
    return {"masked": True} if options.masked else {}


@torch.inference_mode()
def measure(model: Any, twin: Any, case: dict[str, Any], pairs: int | None) -> dict[str, Any]:
    """Times of plain forwards of `model` and profiled ones of `twin` in turn, and the peak memory of both."""
    mode, backend, token_agg = case["mode"], case["backend"], case["token_agg"]
    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (case["batch"], case["seq"]), device=device)
    mask = torch.ones_like(ids) if case.get("masked") else None
    cuda = device.type == "cuda"

    def runner(m: Any) -> Callable[[], Any]:
        call = m if MODES[mode] is None else torch.compile(m, fullgraph=True, dynamic=False, mode=MODES[mode])
        return lambda: call(input_ids=ids, attention_mask=mask, use_cache=False)

    def attach() -> Any:
        if backend == "seed":
            return RecomputingManager(twin, token_agg)
        return fastheads.HookManager(twin, token_agg, backend=backend)

    before = torch.cuda.memory_allocated() if cuda else 0
    synchronize(cuda)
    start = time.perf_counter()
    hooks = attach()
    synchronize(cuda)
    attach_s = time.perf_counter() - start
    held = (torch.cuda.memory_allocated() if cuda else 0) - before
    aside = Aside(twin) if twin is model else contextlib.nullcontext()
    a, b = runner(model), runner(twin)

    def plain_time(repeat: int) -> float:
        with aside:
            return timed(a, repeat, cuda)

    def profiled_time(repeat: int) -> float:
        return timed(b, repeat, cuda)

    peaks = []
    for take in (plain_time, profiled_time):  # compilation, CUDA graphs; then what one forward needs at most
        take(3 if cuda else 1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            low = torch.cuda.memory_allocated()
            take(1)
            peaks.append(torch.cuda.max_memory_allocated() - low)
    repeat = max(1, min(50, int(0.03 / plain_time(3)))) if cuda else 1
    if not pairs:
        pairs = 9 if not cuda or plain_time(1) > 0.1 else 41
    plain: list[float] = []
    profiled: list[float] = []
    for pair in range(pairs):
        order = [(plain_time, plain), (profiled_time, profiled)]
        for take, times in order if pair % 2 == 0 else order[::-1]:
            times.append(take(repeat))
    if backend != "seed":
        check_counts(hooks)
    hooks.__exit__(None, None, None)
    ratios = [y / x - 1 for x, y in zip(plain, profiled, strict=True)]
    low_q, middle, high_q = statistics.quantiles(ratios, n=4)
    result: dict[str, Any] = {
        "plain_ms": statistics.median(plain) * 1e3,
        "profiled_ms": statistics.median(profiled) * 1e3,
        "overhead": middle,
        "quartiles": [low_q, high_q],
        "pairs": pairs,
        "repeat": repeat,
    }
    if cuda:
        result |= {
            "attach_s": attach_s,
            "held_mb": held / 2**20,
            "extra_peak_mb": (peaks[1] - peaks[0]) / 2**20,
        }
    return result


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


class Aside:
    """A context in which no module of `model` has a hook, or a class made for one: the very modules, as they were before.

    A copy of the model is no substitute: where its objects lie in memory alone makes it up to 5 % slower or faster.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = [
            (m, type(m), m._forward_pre_hooks, m._forward_hooks)
            for m in model.modules()
            if m._forward_pre_hooks or m._forward_hooks or hasattr(m, SITE_ATTRIBUTE)
        ]

    def __enter__(self) -> None:
        for module, kind, _, _ in self._found:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
            if hasattr(module, SITE_ATTRIBUTE):
                module.__class__ = kind.__bases__[0]

    def __exit__(self, *_: object) -> None:
        for module, kind, before, after in self._found:
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.__class__ = kind


def check_counts(hooks: fastheads.HookManager) -> None:
    """Exits where forwards were timed that did not count."""
    count = hooks.get_results()["head_output_norm"]["count"]
    if not (count == count[0, 0]).all() or count[0, 0] == 0:
        sys.exit(f"the hooks did not count every forward: {count[:, 0].tolist()}")


def timed(forward: Callable[[], Any], repeat: int, cuda: bool) -> float:
    """Seconds a forward, by the wall clock, the GPU's work included."""
    synchronize(cuda)
    start = time.perf_counter()
    for _ in range(repeat):
        forward()
    synchronize(cuda)
    return (time.perf_counter() - start) / repeat


def machine(options: argparse.Namespace) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    told = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "fastheads": fastheads.__version__,
    }
    if options.gpu:
        import triton

        return told | {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    return told | {"processor": platform.processor() or platform.machine(), "threads": options.threads}


def line(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    shape = f"{row['batch']}x{row['seq']}" + (" masked" if row.get("masked") else "")
    text = (
        f"{row['model']:22} {row['mode']:15} {row['backend']:8} {row['token_agg']:5} {shape:7}"
        f"{row['plain_ms']:9.2f} ms {row['profiled_ms']:9.2f} ms {row['overhead']:+8.2%}  ({low:+.2%} to {high:+.2%})"
    )
    if "held_mb" in row:
        text += f"  attach {row['attach_s']:.2f} s, holds {row['held_mb']:.0f} MB, peak +{row['extra_peak_mb']:.0f} MB"
    return text


if __name__ == "__main__":
    main()
