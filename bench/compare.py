"""Compare the cost of a profiled forward between this checkout and an earlier one.

    git worktree add ../before COMMIT
    python bench/compare.py ../before             # the shape of SmolLM2 on the CPU
    python bench/compare.py ../before --gpu       # a Llama shape with random weights, eager and compiled

Both packages are loaded into one process and profile one model. Blocks of forwards alternate: plain, before, now, now, before,
plain. Each figure is the median of now/before - 1, or of profiled/plain - 1, over such rounds, with its quartiles. Attaching and
detaching are timed in turn too.
"""

import argparse
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from forward import MODES, SHAPES, machine, random_llama, sharing_twin, timed
from torch import nn

import fastheads

BEFORE = "fastheads_before"
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["llama-3.2-1b"], choices=SHAPES, help="GPU")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="GPU")
    parser.add_argument("--cases", nargs="+", default=None, help="batch x seq, such as 4x256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one block")
    parser.add_argument("--threads", type=int, default=2, help="CPU")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    report = {"machine": machine(options), "before": str(options.before.name), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        packages = [imported(options.before, Path(folder)), fastheads]
        for row in measured(options, packages):
            rows.append(row)
            print(line(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


def imported(checkout: Path, folder: Path) -> Any:
    """The package of that checkout under a name of its own, the kernel's and the attributes that it sets included."""
    copy = folder / BEFORE
    shutil.copytree(checkout / "fastheads", copy)
    shutil.copytree(checkout / "kernels" / "head_stats", copy / "kernels")
    for file in copy.rglob("*.py"):
        file.write_text(file.read_text().replace("fastheads", BEFORE))
    sys.path.insert(0, str(folder))
    return importlib.import_module(BEFORE)


def measured(options: argparse.Namespace, packages: list[Any]) -> Iterator[dict[str, Any]]:
    """A row for each shape, mode and case."""
    if not options.gpu:
        torch.set_num_threads(options.threads)
        yield from measured_model(options, packages, "smollm2 shape", smollm2(), ["eager"])
        return
    for shape in options.shapes:
        yield from measured_model(options, packages, shape, random_llama(shape), options.modes)


def smollm2() -> Any:
    """A model of SmolLM2-135M's shape with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def measured_model(
    options: argparse.Namespace, packages: list[Any], name: str, model: Any, modes: list[str]
) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    cases = options.cases or (["1x1", "1x128", "8x128"] if options.gpu else ["1x1", "4x64", "4x256"])
    yield {"model": name, "mode": "attach", "case": "", **times_of_attaching(model, packages)}
    for mode in modes:
        torch._dynamo.reset()
        for case in cases:
            batch, seq = map(int, case.split("x"))
            ids = torch.randint(0, model.config.vocab_size, (batch, seq), device=device)
            how = compared_eagerly if MODES[mode] is None else compared_compiled
            with torch.inference_mode(), how(model, packages, ids, MODES[mode]) as takes:
                yield {"model": name, "mode": mode, "case": case, **rounds(takes, options, device)}


def times_of_attaching(model: Any, packages: list[Any]) -> dict[str, Any]:
    """Seconds of attaching and detaching."""
    times: list[list[float]] = [[], []]
    for turn in range(7):
        order = [0, 1] if turn % 2 == 0 else [1, 0]
        for which in order:
            start = time.perf_counter()
            with packages[which].HookManager(model, "all"):
                pass
            times[which].append(time.perf_counter() - start)
    before, now = (each[1:] for each in times)
    return {
        "before_ms": statistics.median(before) * 1e3,
        "now_ms": statistics.median(now) * 1e3,
        "change": quartiles([b / a - 1 for a, b in zip(before, now, strict=True)]),
    }


@contextmanager
def compared_eagerly(
    model: Any, packages: list[Any], ids: torch.Tensor, _mode: str | None
) -> Iterator[list[Callable[[int], float]]]:
    """Functions that time plain forwards and those with either package's hooks, of the very same modules."""
    dressed = [Dress(model)]
    managers = []
    for package in packages:
        managers.append(package.HookManager(model, "all"))
        dressed.append(Dress(model))
        dressed[0].put_on()

    def timer(dress: Dress) -> Callable[[int], float]:
        def take(repeat: int) -> float:
            dress.put_on()
            return timed(lambda: model(input_ids=ids, use_cache=False), repeat, ids.is_cuda)

        return take

    yield [timer(dress) for dress in dressed]
    for manager, dress in zip(managers, dressed[1:], strict=True):
        dress.put_on()
        manager.remove()
    dressed[0].put_on()


class Dress:
    """The hooks and classes of all modules as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._all = [(m, type(m), [getattr(m, name).copy() for name in HOOKS]) for m in model.modules()]

    def put_on(self) -> None:
        """Have the model's modules be what they were."""
        for module, kind, hooks in self._all:
            if type(module) is not kind:
                module.__class__ = kind
            for name, each in zip(HOOKS, hooks, strict=True):
                found = getattr(module, name)
                if found or each:  # in place: torch's handles hold a reference to the dictionary
                    found.clear()
                    found.update(each)


@contextmanager
def compared_compiled(
    model: Any, packages: list[Any], ids: torch.Tensor, mode: str | None
) -> Iterator[list[Callable[[int], float]]]:
    """Yield functions that time compiled forwards; each has its own copy of the modules, and all share the weights."""
    twins = [model, *(sharing_twin(model) for _ in packages)]
    managers = [package.HookManager(twin, "all") for package, twin in zip(packages, twins[1:], strict=True)]

    def timer(twin: Any) -> Callable[[int], float]:
        call = torch.compile(twin, fullgraph=True, dynamic=False, mode=mode)
        return lambda repeat: timed(lambda: call(input_ids=ids, use_cache=False), repeat, ids.is_cuda)

    yield [timer(twin) for twin in twins]
    for manager in managers:
        manager.remove()


def rounds(
    takes: list[Callable[[int], float]], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Ratios of the times of plain, before and now."""
    for take in takes:
        take(3)
    repeat = max(1, int(options.seconds / takes[0](3)))
    every: list[list[float]] = [[], [], []]
    for _ in range(options.rounds):
        times: list[list[float]] = [[], [], []]
        for which in (0, 1, 2, 2, 1, 0):
            times[which].append(takes[which](repeat))
        for into, found in zip(every, times, strict=True):
            into.append(sum(found) / 2)
    plain, before, now = every
    return {
        "plain_ms": statistics.median(plain) * 1e3,
        "change": quartiles([b / a - 1 for a, b in zip(before, now, strict=True)]),
        "overhead_before": quartiles([b / a - 1 for a, b in zip(plain, before, strict=True)]),
        "overhead_now": quartiles([b / a - 1 for a, b in zip(plain, now, strict=True)]),
        "rounds": options.rounds,
        "repeat": repeat,
    }


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4)


def line(row: dict[str, Any]) -> str:
    text = f"{row['model']:14} {row['mode']:15} {row['case']:6}"
    for name in ("change", "overhead_before", "overhead_now"):
        if name in row:
            low, middle, high = row[name]
            text += f"  {name} {middle:+.2%} ({low:+.2%} to {high:+.2%})"
    if "before_ms" in row:
        return text + f"  {row['before_ms']:.1f} ms, {row['now_ms']:.1f} ms"
    return text + f"  plain {row['plain_ms']:.2f} ms"


if __name__ == "__main__":
    main()
