"""Print an AblationResult in a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastheads.results.ablation import AblationResult
from fastheads.run.terminal import clean

DRAWS = {"random": "of as many heads", "matched": "of as many heads in each layer"}


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
        ),
        soft_wrap=True,
    )
    rows = result.table()
    for metric in dict.fromkeys(row["metric"] for row in rows):
        console.print()
        console.print(Text(f"lowest by {clean(metric)}"))
        own = [row for row in rows if row["metric"] == metric]
        console.print(_curve(own))
        for name, title in DRAWS.items():
            if own[0][f"{name}_mean"] is not None:
                console.print()
                console.print(Text(f"{own[0]['draws']} random draws {title}"))
                console.print(_draws(own, name))
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
    table = _table("heads", "rise", "median", "95 % interval", "KL")
    for row in rows:
        interval = _interval(row["low"], row["high"])
        table.add_row(_share(row), f"{row['rise']:.4f}", f"{row['median']:.4f}", interval, f"{row['kl']:.4f}")
    return table


def _draws(rows: list[dict[str, Any]], name: str) -> Table:
    table = _table("heads", "mean rise", "least", "below the ranking's")
    for row in rows:
        below = f"{row[f'{name}_below']} of {row['draws']}"
        table.add_row(_share(row), f"{row[f'{name}_mean']:.4f}", f"{row[f'{name}_least']:.4f}", below)
    return table


def _share(row: dict[str, Any]) -> str:
    percent = 100 * row["fraction"]
    return (
        f"{row['heads']} ({percent:.0f} %)"
        if abs(percent - round(percent)) < 1e-6
        else f"{row['heads']} ({percent:.1f} %)"
    )


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
