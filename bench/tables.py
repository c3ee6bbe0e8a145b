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
    for name, table in (("forward-cpu", forward_cpu()), ("kernel", kernel())):
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
