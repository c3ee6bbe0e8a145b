"""Streaming errors: what they cost to measure, how reliable they are, and what KV groups chosen by them cost at run time.

    python bench/kv.py                      SmolLM2 on the CPU: overhead, reliability, losses against random draws: hours
    python bench/kv.py --only overhead      one part of it: overhead, reliability or losses
    python bench/kv.py --gpu                overhead on layers of an 8B model with random weights, 8,192 tokens, bfloat16

Prints JSON (`-o FILE` writes it). Times are ratios of CPU or device time in one process, of the least of alternating runs.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastheads
from fastheads import HeadProfile, HookManager, profile
from fastheads.backends.streaming_attention import Window
from fastheads.corpus import Corpus, open_source
from fastheads.intervene.kv_map import kv_map
from fastheads.intervene.streaming import AttentionMass
from fastheads.intervene.streaming_loss import Evaluator, interval, matched_draws, trials_of
from fastheads.run import loading
from fastheads.stats.names import KV_STREAMING_SQUARE_METRIC, STREAMING_METRICS, STREAMING_SQUARE_METRIC

SINK = 4


def say(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def spearman(a: Any, b: Any) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def overhead(model: Any, ids: Tensor, window: int, *, repeats: int, device: str) -> dict[str, Any]:
    """The time of forwards with streaming errors over plain ones, and the peak of memory."""

    def run() -> float:
        if device == "cpu":
            begin = time.process_time()
            model(ids, use_cache=False)
            return time.process_time() - begin
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model(ids, use_cache=False)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def peak(function: Callable[[], float]) -> int | None:
        if device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()

    times: dict[str, list[float]] = {"plain": [], "streaming": [], "heads": []}
    peaks: dict[str, Any] = {}
    with torch.inference_mode():
        for number in range(repeats + 1):
            plain = run()
            peaks["plain"] = peak(run)
            with HookManager(model, "all", streaming=(SINK, window), metrics=STREAMING_METRICS) as hooks:
                model(ids, use_cache=False) if number == 0 else None  # kernels are compiled, factors made
                streaming = run()
                peaks["streaming"] = peak(run)
                hooks.get_results()
            with HookManager(model, "all"):
                heads = run()
            if number:
                for name, value in (("plain", plain), ("streaming", streaming), ("heads", heads)):
                    times[name].append(value)
            say("overhead", number, plain, streaming, heads)
    least = {name: min(values) for name, values in times.items()}
    found: dict[str, Any] = {
        "tokens": ids.numel(),
        "window": window,
        "seconds": least,
        "streaming over plain": least["streaming"] / least["plain"],
        "other metrics over plain": least["heads"] / least["plain"],
    }
    if peaks["plain"]:
        found["peak bytes"] = peaks
        found["peak over plain"] = peaks["streaming"] / peaks["plain"]
    return found


def sequences(tokenizer: Any, seq_len: int, data: str | None) -> Tensor:
    source = open_source(data)
    assert source is not None
    corpus = Corpus(source, tokenizer, cut="stream", seq_len=seq_len)
    rows = [ids for window in corpus.windows() for ids in window.sequences if len(ids) == seq_len]
    return torch.stack(rows).long()


def profiled(model: Any, rows: Tensor, window: int) -> HeadProfile:
    batches = [{"input_ids": row[None]} for row in rows]
    return profile(model, batches, token_agg="all", streaming=(SINK, window), metrics=STREAMING_METRICS)


def smollm2(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = loading.load(loading.find_model(None), dtype="float32", device=args.device)
    model.eval()
    found: dict[str, Any] = {}
    if args.only in (None, "overhead"):
        ids = sequences(tokenizer, 2048, args.data)[:1].to(args.device)
        found["overhead"] = [
            overhead(model.model, ids, window, repeats=args.repeats, device=args.device)
            for window in (128, 256)
        ]
    if args.only == "overhead":
        return found
    rows = sequences(tokenizer, args.seq_len, args.data)
    ranking, held_out = rows[: args.rank], rows[-args.held_out :]
    if args.rank + args.held_out > len(rows):
        raise SystemExit(f"{len(rows)} sequences are too few")
    halves = [profiled(model, ranking[half::2], args.window) for half in range(2)]
    whole = HeadProfile.merge(halves)
    say("profiled")
    found["reliability"] = {"sequences": len(ranking), "tokens": ranking.numel()}
    for metric in (KV_STREAMING_SQUARE_METRIC, STREAMING_SQUARE_METRIC):
        means = [half.statistics(metric)["mean"] for half in halves]
        measured = ~np.isnan(means[0])
        found["reliability"][f"split-half Spearman of {metric}"] = spearman(
            *(mean[measured] for mean in means)
        )
    say(found["reliability"])
    if args.only == "reliability":
        return found
    by_rms, by_mean = (kv_map(whole, keep=1 - args.share, by=by) for by in ("rms", "mean"))
    known = by_rms.known
    number = len(by_rms.streaming)
    with AttentionMass(model, Window(SINK, args.window)) as mass, torch.inference_mode():
        for row in ranking:
            model.model(row[None].to(args.device), use_cache=False)
    masses = mass.of_kv_groups()
    by_mass = sorted(known, key=lambda pair: masses[pair])[:number]
    vocab = len(tokenizer) if args.vocab is None else args.vocab
    trials = trials_of(held_out, args.segment, vocab, sink=SINK, window=args.window)
    evaluator = Evaluator(model, trials, sink=SINK, window=args.window)
    say("base", {name: float(values.mean()) for name, values in evaluator.base.items()})
    costs = []
    sets: list[tuple[str, list[tuple[int, int]]]] = [
        ("rms", by_rms.streaming),
        ("mean", by_mean.streaming),
        ("attention mass", by_mass),
        ("all", known),
    ]
    sets += [
        (f"draw {n}", groups) for n, groups in enumerate(matched_draws(by_rms.streaming, known, args.draws))
    ]
    for name, groups in sets:
        costs.append(evaluator.cost(name, groups))
        say(json.dumps(costs[-1].summary()))
        draws = [cost for cost in costs if cost.name.startswith("draw")]
        found["losses"] = {
            "sink": SINK,
            "window": args.window,
            "held out": {"sequences": len(held_out), "tokens each": args.seq_len, "segment": args.segment},
            "base": {name: vars(interval(values)) for name, values in evaluator.base.items()},
            "streaming KV groups": number,
            "of": len(known),
            "costs": [cost.summary() for cost in costs if not cost.name.startswith("draw")],
            "draws": {
                name: {
                    "number": len(draws),
                    "mean": float(np.mean(values)),
                    "least": float(min(values)),
                    "greatest": float(max(values)),
                }
                for name in evaluator.base
                if (values := [float(cost.rise[name].mean()) for cost in draws])
            },
        }
        write(args, found)
    return found


def of_8b(args: argparse.Namespace) -> dict[str, Any]:
    """An 8B Llama's layers, fewer of them: what is measured grows with the layers, as does the forward but for its embedding."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(  # type: ignore[call-arg]  # of its base
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=args.tokens,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = LlamaModel._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 1024, (args.batch, args.tokens), device="cuda")
    found: dict[str, Any] = {
        "layers": args.layers,
        "batch": args.batch,
        "device": torch.cuda.get_device_name(),
    }
    for window in (128, 256, 1024):
        found[f"window {window}"] = overhead(model, ids, window, repeats=args.repeats, device="cuda")
    weights = sum(p.nbytes for p in model.parameters())
    found["bytes of weights"] = weights
    found["note"] = (
        "peak over plain is with these layers alone: with all 32 the weights are more, and the share less"
    )
    return {"overhead": found}


def write(args: argparse.Namespace, found: dict[str, Any]) -> str:
    about = {
        "fastheads": fastheads.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
    }
    text = json.dumps({"about": about, **found}, indent=1)
    if args.output:
        with open(args.output, "w") as file:
            file.write(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", choices=("overhead", "reliability", "losses"))
    parser.add_argument("--device", default="cpu", help="of SmolLM2")
    parser.add_argument("--data", help="text; default: pydoc_data.topics")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16, help="sequences to rank by")
    parser.add_argument("--held-out", type=int, default=16, help="sequences to score on")
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--vocab", type=int, help="ids of the random segment; default: all")
    parser.add_argument("--share", type=float, default=0.5, help="of the KV groups, streaming")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="of the 8B shape")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    print(write(args, of_8b(args) if args.gpu else smollm2(args)))


if __name__ == "__main__":
    main()
