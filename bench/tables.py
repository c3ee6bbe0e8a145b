"""Writes the README's tables of figures from the committed measurements: `python bench/tables.py`."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


def with_tables(text: str) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    tables = {"forward-cpu": forward_cpu(), "forward-gpu": forward_gpu(), "kernel": kernel()}
    for name, table in tables.items():
        block = f"<!-- table: {name} -->\n{table}\n<!-- end -->"
        text, found = re.subn(
            rf"<!-- table: {name} -->.*?<!-- end -->", block.replace("\\", r"\\"), text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"expected one table {name} in the README, found {found}")
    return text


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
        name = "the seed's manager" if backend == "seed" else f"`{backend}`"
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


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
