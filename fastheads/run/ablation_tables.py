"""Print an AblationResult in a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastheads.results.ablation import AblationResult
from fastheads.run.terminal import clean


def show(result: AblationResult, console: Console, *, listed: int) -> None:
    """Print the curves beside the random draws, and of single heads the `listed` with the largest and the smallest effect."""
    what = {"zero": "replaced by zero", "mean": "replaced by their mean"}[result.mode]
    data = result.about.get("data")
    length = data.get("seq_len", "?") if isinstance(data, dict) else "?"
    source = clean(data.get("source", "?")) if isinstance(data, dict) else "?"
    part = "" if result.complete else " (incomplete)"
    loss = result.base.mean() if result.sequences else float("nan")
    console.print(
        Text(
            f"heads {what}: rise in loss, nats per token, on {result.sequences} sequences of {length} tokens{part} of {source}; "
            f"intact {loss:.4f}"
        )
    )
    rows = result.table()
    for metric in dict.fromkeys(row["metric"] for row in rows):
        console.print()
        console.print(Text(f"lowest by {clean(metric)}"))
        console.print(_curve([row for row in rows if row["metric"] == metric]))
    each = result.each_head_table()
    if each:
        console.print()
        console.print(
            Text(f"each of {len(each)} heads alone, the largest effect first; 95 % intervals over sequences")
        )
        console.print(_each_head(each, listed))


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _curve(rows: list[dict[str, Any]]) -> Table:
    drawn = rows[0]["draws"] is not None
    random = ("random", "least", "below", "same layers", "least", "below") if drawn else ()
    table = _table("heads", "rise", "median", "95 % interval", "KL", *random)
    for row in rows:
        cells = [
            f"{row['heads']} ({row['fraction']:.0%})"
            if _is_whole(row)
            else f"{row['heads']} ({row['fraction']:.1%})"
        ]
        cells += [
            f"{row['rise']:.4f}",
            f"{row['median']:.4f}",
            _interval(row["low"], row["high"]),
            f"{row['kl']:.4f}",
        ]
        if drawn:
            for name in ("random", "matched"):
                below = f"{row[f'{name}_below']} of {row['draws']}"
                cells += [f"{row[f'{name}_mean']:.4f}", f"{row[f'{name}_least']:.4f}", below]
        table.add_row(*cells)
    return table


def _is_whole(row: dict[str, Any]) -> bool:
    return abs(row["fraction"] * 100 - round(row["fraction"] * 100)) < 1e-6


def _each_head(rows: list[dict[str, Any]], listed: int) -> Table:
    table = _table("layer", "head", "KL", "95 % interval", "rise", "95 % interval")
    shown = rows if len(rows) <= 2 * listed else [*rows[:listed], None, *rows[-listed:]]
    for row in shown:
        if row is None:
            table.add_row(*["..."] * 6)
            continue
        cells = [str(row["layer"]), str(row["head"])]
        for name in ("kl", "rise"):
            cells += [f"{row[name]:.5f}", _interval(row[f"{name}_low"], row[f"{name}_high"], 5)]
        table.add_row(*cells)
    return table


def _interval(low: float, high: float, digits: int = 4) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"
