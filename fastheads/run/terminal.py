"""Show a profile in a terminal: progress, tables, a heatmap. Works without colors and in ASCII."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich import box
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from fastheads.results.colours import PUOR, VIRIDIS, Colours, colours_of
from fastheads.results.head_profile import HeadProfile
from fastheads.results.ranking import (
    TIE,
    Ranking,
    by_mean_ablation,
    by_metric,
    displayed_metric,
    missing_ratio,
)
from fastheads.results.text import aligned, clean, ranges, samples_of
from fastheads.run.progress import Status
from fastheads.stats.arrays import Array
from fastheads.stats.names import KV_METRICS
from fastheads.stats.scales import scale_of

# Minimum width of the terminal, in columns, for:
BAR_FROM = 70  # a progress bar beside the numbers
NOTES_FROM = 110  # padding and overhead beside the bar
GAP = 4  # columns between two tables side by side
SOON, A_MINUTE = 2.0, 60.0  # without a terminal: seconds to the first line, and between lines

SHADES = " ░▒▓█"
ASCII_SHADES = " .:-=+*#%@"
LEGEND = 24  # columns of the scale below the heatmap, if there is room
MARKED = 10  # heads at either end that the heatmap marks, if there are four times as many
MARKS, ASCII_MARKS = ("▲", "▼"), ("^", "v")


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[Status], None]]:
    """Yield a function that shows the status of a run: a bar on a terminal, else a line a minute."""
    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _PlainProgress(console)
        return
    bar_column = [BarColumn(bar_width=None)] if console.width >= BAR_FROM else []
    notes = [_Notes()] if console.width >= NOTES_FROM else []
    columns = (*bar_column, _Tokens(), _Speed(), *notes, TextColumn("[dim]left"), TimeRemainingColumn())
    with Progress(*columns, console=console, expand=bool(bar_column), speed_estimate_period=60) as bar:
        task = bar.add_task("tokens", total=None)
        begun = False

        def report(status: Status) -> None:
            nonlocal begun
            if not begun:
                # Work of an earlier run must not count for the speed of this one.
                bar.reset(task, completed=status.all_tokens, total=status.expected)
                begun = True
            bar.update(task, completed=status.all_tokens, total=status.expected, status=status)

        yield report


@contextmanager
def evaluations_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows how many evaluations of a total are done: a bar on a terminal, else a line a minute."""
    if not console.is_terminal:
        yield _PlainCount(console)
        return
    count = TextColumn("{task.completed:,.0f}/{task.total:,.0f} evaluations")
    with Progress(
        BarColumn(bar_width=None), count, TimeRemainingColumn(), console=console, expand=True
    ) as bar:
        task = bar.add_task("evaluations", total=None)
        begun = False

        def report(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                bar.reset(
                    task, completed=done, total=total
                )  # work of an earlier run has no part in the speed
                begun = True
            bar.update(task, completed=done, total=total)

        yield report


class _PlainCount:
    """Print a line soon after the start, and then one a minute."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start: float | None = None  # time of the first report
        self.before = 0  # done by then
        self.next = SOON

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start, self.before = now, done
        elapsed = now - self.start
        if elapsed < self.next or done <= self.before:
            return
        self.next = elapsed + A_MINUTE
        left = (total - done) * elapsed / (done - self.before)
        self.console.print(f"{done:,} of {total:,} evaluations, {left:,.0f} s left", soft_wrap=True)


class _PlainProgress:
    """Print a line soon after the start, and then one a minute."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start: float | None = None  # time of the first status
        self.before = 0  # tokens done by then
        self.next = SOON

    def __call__(self, status: Status) -> None:
        now = time.monotonic()
        if self.start is None:
            self.start, self.before = now, status.all_tokens
        elapsed = now - self.start
        if elapsed < self.next or status.all_tokens <= self.before:
            return
        self.next = elapsed + A_MINUTE
        speed = (status.all_tokens - self.before) / elapsed
        about = "" if status.expected == status.total else "about "
        of = "" if status.expected is None else f" of {about}{status.expected:,}"
        line = f"{status.all_tokens:,}{of} tokens, {speed:,.0f} tokens/s, {_notes(status)}"
        if status.expected is not None:
            line += f", {max(status.expected - status.all_tokens, 0) / speed:,.0f} s left"
        self.console.print(line, soft_wrap=True, highlight=False)


def _notes(status: Status) -> str:
    cost = "" if status.overhead is None else f", profiling {status.overhead:+.1%}"
    return f"{status.padding:.1%} padding{cost}"


class _Tokens(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{int(task.total):,}"
        return Text(f"{int(task.completed):,}{total} tokens", no_wrap=True)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "- tokens/s", style="cyan", no_wrap=True)


class _Notes(ProgressColumn):
    """The share of padding, and the overhead of profiling if known."""

    def render(self, task: Task) -> Text:
        status = task.fields.get("status")
        return Text("" if status is None else _notes(status), style="dim", no_wrap=True)


def show(
    profile: HeadProfile,
    metric: str | None,
    console: Console,
    listed: int | None,
    *,
    model: Any = None,
    top: int | None = None,
    bottom: int | None = None,
) -> None:
    """Print a summary, tables of the `listed` highest and lowest heads by `metric`, and a heatmap of its means.

    If `listed` is None, or the two tables would list all heads, print one table of all. `top` and `bottom`, if either is given,
    are the numbers of highest and lowest heads instead. `metric` None: the ratio to the residual stream, else a relative metric,
    and a line says so. With the profiled `model`, rank by mean-ablation errors.
    """
    ranking, missing = ranking_to_show(profile, metric, model)
    console.print(_summary(profile, ranking, missing))
    if not ranking.measured.any():
        console.print("no head has samples")
        return
    console.print()
    console.print(_tables(profile, ranking, console, listed=listed, ends=(top, bottom)))
    if notes := _notes_below(profile, ranking, console):
        console.print(*notes, sep="\n")
    console.print()
    console.print(heatmap(profile, ranking, console))


def ranking_to_show(profile: HeadProfile, metric: str | None, model: Any = None) -> tuple[Ranking, str]:
    """Return the ranking that `show` prints, and the line about what it is shown instead of, or ""."""
    if model is not None:
        return by_mean_ablation(profile, model), ""
    if metric is not None:
        return by_metric(profile, metric), ""
    return by_metric(profile, displayed_metric(profile.metrics)), missing_ratio(profile)


def _summary(profile: HeadProfile, ranking: Ranking, missing: str) -> RenderableType:
    """Say what was measured; `missing` is the line about the ratio to the residual stream, if the profile lacks it."""
    metadata = profile.metadata
    data = metadata.get("data", {})
    rows, heads = profile.shape
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    weights = metadata.get("weights")
    dtypes = weights.get("dtypes") if isinstance(weights, dict) else None
    dtype = ", " + ", ".join(map(clean, dtypes)) if isinstance(dtypes, list) and dtypes else ""
    table.add_row(
        "model", Text(f"{clean(metadata.get('model', '?'))}: {rows} layers of {heads} heads{dtype}")
    )
    if metadata.get("layers") is not None:
        table.add_row("layers", Text(f"{ranges(metadata['layers'])} only"))
    if data:
        table.add_row("data", Text(clean(data.get("source", "?"))))
        amount = f"{data.get('tokens', 0):,} tokens in {data.get('sequences', 0):,} sequences"
        table.add_row("", Text(amount + ("" if data.get("complete", True) else " (incomplete)")))
    if ranking.name in profile.metrics:
        moments = profile.arrays[ranking.name]
        agg, skipped = clean(metadata.get("token_agg", "?")), metadata.get("skip_first", 0)
        said = f"{samples_of(profile, ranking.name)}, token_agg {agg}, skip_first {skipped}"
        table.add_row("samples", Text(said))
        if nonfinite := int(moments.nonfinite.sum()):
            what = f"{nonfinite:,} samples were NaN or infinite and are not included"
            table.add_row("", Text(what, style="red"))
    scale = scale_of(ranking.name)
    across = len(set(profile.layers)) > 1 or scale.comparable
    note = f" ({scale.note})" if scale.note and across else ""
    table.add_row("metric", Text(f"{ranking.name}{note}"))
    if missing:
        table.add_row("", Text(missing))
    return table


def _tables(
    profile: HeadProfile,
    ranking: Ranking,
    console: Console,
    *,
    listed: int | None,
    ends: tuple[int | None, int | None],
) -> RenderableType:
    values, tied = ranking.values, ranking.tied()
    plus_minus = "+-" if console.options.ascii_only else "±"
    number = aligned(values[ranking.measured], None if ranking.sem is None else ranking.sem[ranking.measured])

    def table(title: str, chosen: Sequence[tuple[int, int]]) -> Table:
        result = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
        columns = ["layer", "head", "mean" if ranking.name in profile.metrics else "error"]
        columns += [f"{plus_minus} sem"] if ranking.sem is not None else []
        columns += ["rms"] if ranking.rms is not None else []
        for name in columns:
            result.add_column(name, justify="right", no_wrap=True)
        if tied.any():
            result.add_column("", no_wrap=True)
        for row, head in chosen:
            numbers = [number(values[row, head])]
            if ranking.sem is not None:
                sem = ranking.sem[row, head]
                numbers.append("-" if math.isnan(sem) else f"{plus_minus}{number(sem)}")
            if ranking.rms is not None:
                numbers.append(number(ranking.rms[row, head]))
            if tied.any():
                numbers.append("~" if tied[row, head] else " ")
            result.add_row(str(profile.layers[row]), str(head), *numbers)
        return result

    highest, lowest = ranking.cells(descending=True), ranking.cells()
    top, bottom = ends
    if top is None and bottom is None:
        if listed is None or 2 * listed >= len(highest):
            return table(f"{len(highest):,} heads, highest first", highest)
        top = bottom = listed
    tables = []
    for name, wished, cells in (("highest", top, highest), ("lowest", bottom, lowest)):
        if wished is not None:
            title = f"{len(cells[:wished]):,} {name} head{'' if wished == 1 else 's'}"
            tables.append(table(title, cells[:wished]))
    both = Table.grid(padding=(0, GAP))
    both.add_row(*tables)
    wanted = sum(Measurement.get(console, console.options, table).maximum + GAP for table in tables) - GAP
    return both if wanted <= console.width else Group(*tables)


def _notes_below(profile: HeadProfile, ranking: Ranking, console: Console) -> list[Text]:
    """Explain the marks and columns of the tables."""
    notes = []
    if ranking.tied().any():
        root = "sqrt(sem_a^2 + sem_b^2)" if console.options.ascii_only else "√(sem_a² + sem_b²)"
        notes.append(f"~ a tie: within {TIE} {root} of a neighbour in the ranking")
        if profile.metadata.get("token_agg") == "token":
            notes.append("sem takes tokens for independent, so it is too small, and there are more ties")
    if ranking.rms is not None:
        notes.append("rms: the root of the mean of the squares")
    return [Text(note, style="dim") for note in notes]


def heatmap(profile: HeadProfile, ranking: Ranking, console: Console) -> RenderableType:
    """Draw the means, one line per layer; heads that do not fit the width are in further blocks below."""
    means = np.where(ranking.measured, ranking.values, math.nan)
    colours = colours_of(ranking.name, means)
    paint = _painter(console, colours)
    missing = "-" if console.options.ascii_only else "·"
    marks = _marks(ranking, console)

    labels = [str(layer) for layer in profile.layers]
    margin = max(len("layer"), *map(len, labels)) + 1
    room = max(console.width - margin, 1)
    is_of_groups = ranking.name in KV_METRICS
    heads = profile.shape[1]
    if is_of_groups:  # fewer than heads
        heads = int(np.flatnonzero(ranking.measured.any(axis=0)).max(initial=0)) + 1
    cell = min(max(room // heads, 1), 4)
    columns = min(room // cell, heads)
    if 8 <= columns < heads:
        columns -= columns % 8  # blocks start at multiples of eight

    lines: list[Text] = []
    for first in range(0, heads, columns):
        block = range(first, min(first + columns, heads))
        if first:
            lines.append(Text())
        unit = "KV" if is_of_groups else "head"
        lines.append(Text(unit.rjust(margin - 1) + " " + _ticks(block, cell), style="dim", no_wrap=True))
        for row, label in enumerate(labels):
            line = Text(label.rjust(margin - 1) + " ", no_wrap=True)
            for head in block:
                if math.isnan(means[row, head]):
                    line.append(missing.center(cell), style="dim")
                else:
                    line.append_text(
                        paint(colours.position(means[row, head]), cell, marks.get((row, head), ""))
                    )
            lines.append(line)
    return Group(*lines, Text(), *_legend(means, colours, paint, marks, margin=margin, width=console.width))


def _marks(ranking: Ranking, console: Console) -> dict[tuple[int, int], str]:
    """Return the marks of the highest and of the lowest heads, if there are enough others."""
    cells = ranking.cells()
    if len(cells) < 4 * MARKED:
        return {}
    high, low = ASCII_MARKS if console.options.ascii_only else MARKS
    return dict.fromkeys(cells[-MARKED:], high) | dict.fromkeys(cells[:MARKED], low)


def _legend(
    means: Array,
    colours: Colours,
    paint: Callable[[float, int, str], Text],
    marks: dict[tuple[int, int], str],
    *,
    margin: int,
    width: int,
) -> list[Text]:
    """Explain the colours and the marks below a heatmap."""
    found = means[np.isfinite(means)]
    beyond = ["<" if (found < colours.low).any() else "", ">" if (found > colours.high).any() else ""]
    low, high = f"{beyond[0]}{colours.low:.4g} ", f" {beyond[1]}{colours.high:.4g}"
    scale = Text(" " * margin + low, no_wrap=True)
    steps = max(min(LEGEND, width - margin - len(low) - len(high)), 2)
    for step in range(steps):
        scale.append_text(paint(step / (steps - 1), 1, ""))
    lines = [scale.append(high)]
    if colours.kind == "log":
        lines.append(Text(" " * margin + "logarithmic", style="dim"))
    if colours.kind == "diverging":
        lines.append(Text(" " * margin + f"in the middle: {colours.centre:.4g}", style="dim"))
    if marks:
        high, low = list(dict.fromkeys(marks.values()))
        lines.append(
            Text(" " * margin + f"{high} the {MARKED} highest, {low} the {MARKED} lowest", style="dim")
        )
    return lines


def _ticks(block: range, cell: int) -> str:
    """Label some heads with their number, above the first column of each."""
    widest = len(str(block[-1]))
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * cell > widest)
    line = ""
    for head in block:
        if head % step == 0 and len(line) <= (head - block[0]) * cell:
            line = line.ljust((head - block[0]) * cell) + str(head)
    return line[: len(block) * cell]


def _painter(console: Console, colours: Colours) -> Callable[[float, int, str], Text]:
    """Return a function that draws a cell for a place on the palette, 0 to 1, with a mark or "" on it.

    Places are colors if the terminal has enough, else shades.
    """
    if (
        console.is_terminal
        and not console.no_color
        and console.color_system in ("256", "truecolor", "windows")
    ):
        palette = PUOR if colours.kind == "diverging" else VIRIDIS

        def colored(place: float, cell: int, mark: str) -> Text:
            color = _color(palette, place)
            ink = ("black" if sum(color.get_truecolor()) > 384 else "white") if mark else None
            return Text(mark.center(cell), style=Style(bgcolor=color, color=ink))

        return colored
    shades = ASCII_SHADES if console.options.ascii_only else SHADES

    def shaded(place: float, cell: int, mark: str) -> Text:
        shade = shades[min(int(place * len(shades)), len(shades) - 1)]
        return Text(mark.center(cell, shade) if mark else shade * cell)

    return shaded


def _color(palette: Sequence[tuple[int, int, int]], place: float) -> Color:
    position = place * (len(palette) - 1)
    i = min(int(position), len(palette) - 2)
    part = position - i
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(palette[i], palette[i + 1], strict=True))
    return Color.from_rgb(red, green, blue)
