"""How fast `profile()` runs a corpus, beside what the model can do and beside a plain loop.

    python bench/runner.py                                          # Llama shapes with random weights, one GPU
    torchrun --nproc-per-node 2 bench/runner.py                     # two GPUs beside one
    python bench/runner.py --cpu                                    # a tiny shape, to see that it works

The corpus is a file of documents of mixed length, made of 4,096 words, and read, tokenized and batched as any other. In turn,
A B C, C B A, the same documents are run

- `runner`: by `profile()`, with its checkpoints, from the first batch on to the end of the last;
- `bare`: the decoder's forwards on the same batches, which lie on the device already, without hooks;
- `plain`: a loop of `model(**batch)` over padded batches of as many tokens in the corpus' order, with the head; every fourth
  of these batches.

Tokens are real ones, without padding; the figures are medians over rounds. Under torchrun the first process runs the corpus
alone, then all of them together. `--json FILE` writes what is printed.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from forward import SHAPES, machine, random_llama
from tokenizers import Tokenizer, models, pre_tokenizers

import fastheads
from fastheads.corpus.sources import text_file
from fastheads.corpus.token_batches import collate, plan
from fastheads.corpus.windows import Corpus
from fastheads.models.sites import decoder_of
from fastheads.run.batches import automatic_budget
from fastheads.run.job import Job

WORDS = 4096
TOKENS = {"llama-3.2-1b": 4_000_000, "llama-3-8b": 1_500_000}
WARM = 2  # batches of each kind before any time is taken
PLAIN_SHARE = 4  # the plain loop runs one of so many of its batches: it is several times as slow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--shapes", nargs="+", default=list(TOKENS), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, help="in the corpus")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, help="default: what profile() chooses")
    parser.add_argument("--token-agg", default="all", choices=["last", "all", "token"])
    parser.add_argument("--compile", action="store_true", help="the runner and the bare forwards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    options.gpu, options.threads = not options.cpu, torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Job(device="cpu" if options.cpu else "cuda") as job:
        for shape in ["tiny"] if options.cpu else options.shapes:
            bench = Bench(shape, options, Path(folder), job)
            row = bench.alone() if job.place.world == 1 else bench.together()
            del bench
            if job.place.rank == 0:
                print(line(row), flush=True)
                rows.append(row)
                if options.json:
                    report = {"machine": machine(options), "rows": rows}
                    options.json.write_text(json.dumps(report, indent=1) + "\n")


class Bench:
    """One model and its corpus."""

    def __init__(self, shape: str, options: argparse.Namespace, folder: Path, job: Job) -> None:
        self.shape, self.options, self.folder, self.job = shape, options, folder, job
        self.model = tiny_llama() if options.cpu else random_llama(shape)
        self.device = next(self.model.parameters()).device
        self.tokenizer = word_tokenizer()
        self.tokens = options.tokens or TOKENS.get(shape, 20_000 if options.cpu else 1_000_000)
        self.path = folder / f"{shape}.jsonl"
        write_documents(self.path, self.tokens, options.seq_len)
        self.budget = options.batch_tokens or automatic_budget(
            self.model.config, self.device, next(self.model.parameters()).dtype, options.seq_len
        )
        self.decoder = decoder_of(self.model)

    def corpus(self, shard: tuple[int, int] = (0, 1)) -> Corpus:
        return Corpus(text_file(self.path), self.tokenizer, seq_len=self.options.seq_len, shard=shard)

    # ---------------------------------------------------------------- one GPU

    def alone(self) -> dict[str, Any]:
        """The three in turn."""
        windows = [window.sequences for window in self.corpus().windows()]
        same = [[rows[i] for i in batch] for rows in windows for batch in plan_of(rows, self.budget)]
        plain = list(in_order((row for rows in windows for row in rows), self.budget))[::PLAIN_SHARE]
        # Padding on the right needs no mask where attention looks back only: what the runner gives the decoder.
        bare = [collate(rows)["input_ids"].to(self.device) for rows in same]
        call = torch.compile(self.decoder, dynamic=True) if self.options.compile else self.decoder
        self.profile(max_batches=WARM)
        self.bare(call, bare[:WARM] + bare[-WARM:])
        self.plain(plain[:WARM])
        ways: dict[str, Callable[[], float]] = {
            "runner": self.profile,
            "bare": lambda: self.bare(call, bare),
            "plain": lambda: self.plain(plain),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.options.rounds):
            for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                seconds[name].append(ways[name]())
        tokens = {
            name: count(batches) for name, batches in (("runner", same), ("bare", same), ("plain", plain))
        }
        speeds = {name: [tokens[name] / s for s in times] for name, times in seconds.items()}
        row = self.about(tokens["runner"]) | {
            f"{name}_tokens_s": statistics.median(found) for name, found in speeds.items()
        }
        for name in ("bare", "plain"):
            ratios = [a / b for a, b in zip(speeds["runner"], speeds[name], strict=True)]
            row[f"runner_over_{name}"] = statistics.median(ratios)
            row[f"runner_over_{name}_range"] = [min(ratios), max(ratios)]
        return row | {
            "padding": padding(same),
            "plain_padding": padding(plain),
            "overhead": self.found["data"].get("overhead"),
            "seconds": seconds,
        }

    def profile(self, max_batches: int | None = None, job: Job | None = None) -> float:
        """Seconds from the first batch to the end of the last."""
        begun: list[float] = []
        shard = (0, 1) if job is None else job.place.shard
        corpus = self.corpus(shard)
        ended = 0.0

        def seen(done: int, total: int | None) -> None:
            begun.append(time.perf_counter())
            if max_batches is not None and len(begun) > max_batches:
                raise Enough

        try:
            found = fastheads.profile(
                self.model,
                corpus,
                token_agg=self.options.token_agg,
                batch_tokens=self.budget,
                compile=self.options.compile,
                checkpoint=self.folder / f"{self.shape}.checkpoint",
                progress=seen,
                job=job,
            )
            ended = time.perf_counter()
            self.found = found.metadata
        except Enough:
            return 0.0
        check_counts(found)
        return ended - begun[0]

    def bare(self, call: Any, batches: list[torch.Tensor]) -> float:
        with torch.inference_mode():
            self.synchronize()
            start = time.perf_counter()
            for ids in batches:
                call(input_ids=ids, use_cache=False)
            self.synchronize()
        return time.perf_counter() - start

    def plain(self, batches: list[list[torch.Tensor]]) -> float:
        with torch.inference_mode():
            self.synchronize()
            start = time.perf_counter()
            for rows in batches:
                batch = {key: value.to(self.device) for key, value in collate(rows).items()}
                self.model(**batch)
            self.synchronize()
        return time.perf_counter() - start

    # ---------------------------------------------------------------- several

    def together(self) -> dict[str, Any]:
        """The first process alone, and all of them."""
        place = self.job.place
        alone: list[float] = []
        shared: list[float] = []
        for number in range(-1, self.options.rounds):  # the first is no round, but to warm up
            self.barrier()
            if place.rank == 0:
                alone.append(self.profile())
            self.barrier()
            shared.append(max(self.job.all_gather_object(self.profile(job=self.job))))
            if number == -1:
                alone.clear()
                shared.clear()
        tokens = self.found["data"]["tokens"]
        if place.rank:
            return {}
        ratios = [a / b for a, b in zip(alone, shared, strict=True)]
        return self.about(tokens) | {
            "processes": place.world,
            "one_tokens_s": tokens / statistics.median(alone),
            "all_tokens_s": tokens / statistics.median(shared),
            "all_over_one": statistics.median(ratios),
            "all_over_one_range": [min(ratios), max(ratios)],
            "seconds": {"one": alone, "all": shared},
        }

    def barrier(self) -> None:
        self.job.all_gather_object(None)

    # ---------------------------------------------------------------- both

    def about(self, tokens: int) -> dict[str, Any]:
        return {
            "model": self.shape,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "mode": "compiled" if self.options.compile else "eager",
            "token_agg": self.options.token_agg,
            "tokens": tokens,
            "seq_len": self.options.seq_len,
            "batch_tokens": self.budget,
            "rounds": self.options.rounds,
        }

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Enough(Exception):
    """Warm."""


def plan_of(rows: list[torch.Tensor], budget: int) -> list[list[int]]:
    return plan([len(row) for row in rows], budget)


def in_order(rows: Iterator[torch.Tensor], budget: int) -> Iterator[list[torch.Tensor]]:
    """Batches of at most `budget` tokens with their padding, as the rows come."""
    batch: list[torch.Tensor] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(len(row), *map(len, batch)) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padding(batches: list[list[torch.Tensor]]) -> float:
    return 1 - count(batches) / sum(len(rows) * max(map(len, rows)) for rows in batches)


def count(batches: list[list[torch.Tensor]]) -> int:
    """Count the valid tokens."""
    return sum(len(row) for rows in batches for row in rows)


def check_counts(found: fastheads.HeadProfile) -> None:
    """Exits where not every sample counted once."""
    data, count = found.metadata["data"], found.moments["head_output_norm"].count
    want = data["tokens"] if found.metadata["token_agg"] == "token" else data["sequences"]
    if not bool((count == want).all()):
        sys.exit(f"{want} samples a head were expected: {count.tolist()}")


def write_documents(path: Path, tokens: int, longest: int) -> None:
    """JSON lines of about so many words in all, their numbers log-normal."""
    chance = random.Random(0)
    with path.open("w") as file:
        while tokens > 0:
            length = min(max(int(chance.lognormvariate(5.5, 1.0)), 8), longest)
            words = " ".join(f"w{number}" for number in chance.choices(range(WORDS), k=length))
            file.write(json.dumps({"text": words}) + "\n")
            tokens -= length


def word_tokenizer() -> Any:
    """A token a word."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def line(row: dict[str, Any]) -> str:
    if "processes" in row:
        low, high = row["all_over_one_range"]
        return (
            f"{row['model']:14} {row['mode']:9} one {row['one_tokens_s']:10,.0f} tokens/s  {row['processes']} together "
            f"{row['all_tokens_s']:10,.0f} tokens/s  {row['all_over_one']:.3f} ({low:.3f} to {high:.3f})"
        )
    text = f"{row['model']:14} {row['mode']:9} {row['batch_tokens']:6} tokens/batch"
    for name in ("runner", "bare", "plain"):
        text += f"  {name} {row[f'{name}_tokens_s']:10,.0f} tokens/s"
    for name in ("bare", "plain"):
        low, high = row[f"runner_over_{name}_range"]
        text += f"  runner/{name} {row[f'runner_over_{name}']:.3f} ({low:.3f} to {high:.3f})"
    return text + f"  padding {row['padding']:.1%} and {row['plain_padding']:.1%}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
