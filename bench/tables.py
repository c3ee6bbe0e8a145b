"""Write the tables of figures of the README and the documentation from the committed measurements: `python bench/tables.py`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    for page in pages():
        page.write_text(with_tables(page.read_text()))


def pages() -> list[Path]:
    """The README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str) -> str:
    """Return `text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

    def made(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"unknown table {found[1]}: choose one of {', '.join(TABLES)}")
        table = TABLES[found[1]]()
        return f"<!-- table: {found[1]} -->\n" + (f"{table}\n" if table else "") + "<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", made, text, flags=re.DOTALL)


def forward_cpu() -> str:
    report = load("forward-cpu")
    machine, rows = report["machine"], report["rows"]
    lines = ["| backend | added to the plain forward | quartiles of the pairs |", "| --- | --- | --- |"]
    for row in rows:
        low, high = row["quartiles"]
        lines.append(f"| `{row['backend']}` | {row['overhead']:.1%} | {low:.1%} to {high:.1%} |")
    plain = rows[0]["plain_ms"] / 1e3
    lines += ["", f"The plain forward took {plain:.1f} s (torch {machine['torch']}, {machine['date']})."]
    return "\n".join(lines)


def forward_gpu() -> str:
    """A line for each model and mode, or backend; a column for each batch x seq; milliseconds and what the hooks add."""
    report = load("forward-h200")
    machine = report["machine"]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    earlier = {row["commit"][:7] for row in report["rows"] if "commit" in row}
    for row in sorted(report["rows"], key=_order):
        mode = row["mode"] + (" with a mask" if row.get("masked") else "")
        kind = (row["model"], mode, row["backend"], row["token_agg"])
        cell = f"{row['plain_ms']:.1f} ms, {row['overhead']:+.1%}" + (" *" if "commit" in row else "")
        found.setdefault(kind, {})[f"{row['batch']}×{row['seq']}"] = cell
    columns = list(dict.fromkeys(column for cells in found.values() for column in cells))
    lines = [
        f"| model, mode | backend, `token_agg` | {' | '.join(columns)} |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for (model, mode, backend, token_agg), cells in found.items():
        values = " | ".join(cells.get(column, "") for column in columns)
        name = "recomputed attention" if backend == "seed" else f"`{backend}`"
        lines.append(f"| {model}, {mode} | {name}, `{token_agg}` | {values} |")
    lines += [
        "",
        f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, transformers {machine['transformers']}, "
        f"{machine['date']}, commit {machine['commit'][:7]}"
        + (f" (* {', '.join(sorted(earlier))})" if earlier else "")
        + ". An eager forward of a small batch is the host's Python, whose speed varies by half from machine to machine.",
    ]
    return "\n".join(lines)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Models as they come, small cases first; what is compared with the library last."""
    models, modes = ["llama-3.2-1b", "llama-3-8b"], ["eager", "compiled", "reduce-overhead"]
    place = models.index(row["model"]) if row["model"] in models else len(models)
    return (
        row["backend"] != "auto",
        modes.index(row["mode"]),
        row.get("masked", False),
        place,
        row["backend"],
        row["token_agg"] != "last",
        row["batch"] * row["seq"],
    )


def kernel() -> str:
    report = load("kernel-h200")
    lines = ["| head_dim, heads | x | `fast` | `exact` |", "| --- | --- | --- | --- |"]
    for case in report["cases"]:
        cells = [
            f"{case[p]['tb_s']:.2f} TB/s, {case[p]['percent_of_ceiling']:.0f} %" for p in ("fast", "exact")
        ]
        size = f"{case['bytes'] / 1e6:.0f} MB"
        lines.append(f"| {case['head_dim']}, {case['heads']} | {size} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"{report['gpu']}, torch {report['torch']}, Triton {report['triton']}, {report['date']}, commit {report['commit'][:7]}; "
        "percent of the read rate measured in the same run.",
    ]
    return "\n".join(lines)


SCORES = {
    "head_residual_ratio": "`head_residual_ratio` (the default)",
    "mean_ablation_error_ratio": "mean-ablation error per residual (`--vectors`)",
    "relative_head_residual_contribution_norm": "`relative_head_residual_contribution_norm`",
    "relative_head_output_norm": "`relative_head_output_norm` (AHON LN)",
    "head_residual_contribution_norm": "`head_residual_contribution_norm`",
    "head_output_norm": "`head_output_norm`",
}


def science(name: str = "science-smollm2") -> str:
    """The rise in loss when the lowest heads by each score are zeroed, beside random draws."""
    report = load(name)
    curves = report["curves"]["english"]
    points = [point for point in curves["points"] if point["fraction"] in (0.05, 0.1, 0.2, 0.3)]
    lines = ["| lowest heads by | " + " | ".join(f"{point['fraction']:.0%}" for point in points) + " |"]
    lines.append("| --- " * (1 + len(points)) + "|")
    for score, label in SCORES.items():
        lines.append(f"| {label} | " + " | ".join(f"{p['scores'][score]['mean']:.3f}" for p in points) + " |")
    for kind, label in (
        ("random", "random heads"),
        ("same_layers", "random heads, as many in each layer as the ratio takes"),
    ):
        cells = []
        for point in points:
            means = [draw["mean"] for draw in point[kind]["draws"]]
            cells.append(f"{sum(means) / len(means):.3f} ({min(means):.3f})")
        lines.append(f"| {label}: mean (least) of {len(means)} draws | " + " | ".join(cells) + " |")
    options, machine = report["options"], report["machine"]
    lines += [
        "",
        f"Rise in loss, nats per token, of {report['model']} with these heads zeroed: {options['sequences']} held-out "
        f"sequences of {options['seq_len']} tokens of English text, intact loss {curves['base']['mean']:.3f}. "
        f"`python bench/science.py`, "
        f"{machine['gpu']}, {machine['date']}, commit {machine['commit'][:7]}.",
    ]
    return "\n".join(lines)


def science_gemma() -> str:
    return science("science-gemma3-270m") if (RESULTS / "science-gemma3-270m.json").exists() else ""


def science_correlations() -> str:
    """Spearman's correlation of each score with what silencing a single head does."""
    report = load("science-smollm2")
    lines = [
        "| score | zeroed: KL | zeroed: loss | replaced by its mean: KL | loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    truths = ("zero_kl", "zero_ce", "mean_kl", "mean_ce")
    for score, label in SCORES.items():
        found = report["correlations"][score]
        cells = [f"{found[t]['rho']:.2f} ({found[t]['low']:.2f} to {found[t]['high']:.2f})" for t in truths]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append(
        "| split-half reliability | " + " | ".join(f"{report['reliability'][t]:.2f}" for t in truths) + " |"
    )
    lines += [
        "",
        f"Spearman's correlation with the effect of a single head, over {len(report['single_heads'])} heads of "
        f"{report['model']}, with 95 % bootstrap intervals over heads and sequences.",
    ]
    return "\n".join(lines)


def kv() -> str:
    """Make the table of the rise in loss when half of the KV groups stream, by how they were chosen."""
    report = load("kv-smollm2-h200")["losses"]
    labels = {
        "rms": "`kv_group_streaming_error`, root mean square (`fastheads kv`)",
        "attention mass": "attention mass beyond the window",
        "all": "all groups",
    }
    kinds = ("text", "repeated segment")
    costs = {cost["chosen by"]: cost["rise"] for cost in report["costs"]}
    lines = ["| streaming groups chosen by | text | repeated segment |", "| --- | --- | --- |"]
    for name in ("rms", "attention mass"):
        lines.append(
            f"| lowest {labels[name]} | "
            + " | ".join(f"{costs[name][kind]['mean']:.3f}" for kind in kinds)
            + " |"
        )
    draws = report["draws"]
    cells = [f"{draws[kind]['mean']:.3f} ({draws[kind]['least']:.3f})" for kind in kinds]
    lines.append(f"| random: mean (least) of {draws['text']['number']} draws | " + " | ".join(cells) + " |")
    lines.append("| all groups | " + " | ".join(f"{costs['all'][kind]['mean']:.3f}" for kind in kinds) + " |")
    held = report["held out"]
    lines += [
        "",
        f"Rise in loss, nats per token, of SmolLM2-135M when {report['streaming KV groups']} of {report['of']} KV groups see "
        f"only {report['sink']} first and {report['window']} last tokens: on text beyond the window, and on a segment of "
        f"{held['segment']} random tokens that is repeated; {held['sequences']} sequences of {held['tokens each']:,} "
        "tokens. `python bench/kv.py`.",
    ]
    return "\n".join(lines)


def runner() -> str:
    """Tokens a second of `profile()` over a corpus of mixed lengths."""
    report, two = load("runner-h200"), load("runner-h200-x2")
    lines = [
        "| model | tokens/s | over bare forwards of the same batches | over a loop in the corpus' order |"
    ]
    lines.append("| --- | --- | --- | --- |")
    for row in report["rows"]:
        lines.append(
            f"| {row['model']} | {row['runner_tokens_s']:,.0f} | {row['runner_over_bare']:.2f} | {row['runner_over_plain']:.1f} |"
        )
    (row,) = two["rows"]
    machine = report["machine"]
    lines += [
        "",
        f"Speeds as ratios, medians of {report['rows'][0]['rounds']} rounds on one {machine['gpu']} (`python bench/runner.py`, "
        f"{machine['date']}, commit {machine['commit'][:7]}). {row['processes']} GPUs were {row['all_over_one']:.2f} times "
        f"as fast as one ({row['model']}: {row['one_tokens_s']:,.0f} and {row['all_tokens_s']:,.0f} tokens a second).",
    ]
    return "\n".join(lines)


def peers() -> str:
    """A row for each tool on the same model and tokens; nothing while there are no figures."""
    if not (RESULTS / "peers-cpu.json").exists():
        return ""
    report = load("peers-cpu")
    lines = [
        "| tool | time over the plain forward | peak memory added | error against float64 | right under left padding |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in report["rows"]:
        padding = {True: "yes", False: "no", None: "not tried"}[row["left_padding"]]
        lines.append(
            f"| {row['tool']} | {row['time_ratio']:.2f} | {row['peak_bytes'] / 2**20:,.0f} MiB | {row['error']:.0e} | {padding} |"
        )
    return "\n".join(lines)


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


TABLES: dict[str, Callable[[], str]] = {
    "forward-cpu": forward_cpu,
    "forward-gpu": forward_gpu,
    "kernel": kernel,
    "kv": kv,
    "peers": peers,
    "runner": runner,
    "science": science,
    "science-correlations": science_correlations,
    "science-gemma": science_gemma,
}

if __name__ == "__main__":
    main()
