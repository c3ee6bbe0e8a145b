"""Show a map of KV groups in a terminal: a table, a heatmap, and what the map costs."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastheads.intervene.kv_map import KvMap
from fastheads.intervene.streaming_loss import Interval, interval
from fastheads.results.head_profile import HeadProfile
from fastheads.results.ranking import by_metric
from fastheads.run.kv import Evaluation
from fastheads.run.terminal import clean, heatmap
from fastheads.stats.names import KV_STREAMING_METRIC


def show(
    found: KvMap, profile: HeadProfile, result: Evaluation | None, console: Console, listed: int | None
) -> None:
    """Print the map, with the `listed` highest and lowest groups (None: all), and its evaluation."""
    kept, known = len(found.kept), len(found.known)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", Text(clean(found.model or "?")))
    data = found.data or {}
    table.add_row("data", Text(f"{data.get('tokens', 0):,} tokens in {data.get('sequences', 0):,} sequences"))
    table.add_row("window", Text(f"the first {found.sink} tokens and the last {found.window}"))
    unknown = kept + len(found.streaming) - known
    note = "" if not unknown else f" ({unknown} of them unknown: windowed already, or not to be seen)"
    table.add_row("full cache", Text(f"{kept} of {kept + len(found.streaming)} KV groups{note}"))
    for site, why in list(profile.metadata.get("streaming_unknown", {}).items())[:3]:
        table.add_row("", Text(f"{clean(site)}: {clean(why)}", style="dim"))
    console.print(table)
    console.print()
    console.print(_groups(found, console, listed))
    console.print(
        Text(f"error: the {found.by} over tokens of what is lost, over the residual stream", style="dim")
    )
    console.print()
    console.print(heatmap(profile, by_metric(profile, KV_STREAMING_METRIC), console))
    if result is not None:
        console.print()
        console.print(_costs(result, console))


def _groups(found: KvMap, console: Console, listed: int | None) -> Table:
    errors = dict(zip(found.layers, found.errors, strict=True))
    full = dict(zip(found.layers, found.full, strict=True))
    ranked = found.ranked()
    is_short = listed is not None and 2 * listed < len(ranked)
    shown = [*ranked[:listed], None, *ranked[-(listed or 0) :]] if is_short else ranked
    title = f"KV groups, highest first{f' ({listed} and {listed} of {len(ranked)})' if is_short else ''}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for name in ("layer", "KV group", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cache", no_wrap=True)
    for pair in shown:
        if pair is None:
            table.add_row("...", "", "", "")
            continue
        layer, group = pair
        keeps = "full" if full[layer][group] else f"{found.sink} + {found.window}"
        table.add_row(str(layer), str(group), f"{errors[layer][group]:.4g}", keeps)
    return table


def _costs(result: Evaluation, console: Console) -> Table:
    to = "to" if console.options.ascii_only else "–"

    def text(value: Interval) -> str:
        return f"{value.mean:+.4f} ({value.low:+.4f} {to} {value.high:+.4f})"

    names = list(result.base)
    title = f"rise in loss (nats; 95 % over {result.sequences} sequences of {result.tokens:,} tokens)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for name in ("streaming groups chosen by", "number", *names):
        table.add_column(name, justify="left" if "by" in name else "right")
    for cost in result.costs:
        values = [text(interval(cost.rise[name])) for name in names]
        table.add_row(cost.name, str(len(cost.kv_groups)), *values)
    if result.draws:
        spread = []
        for name in names:
            means = [float(cost.rise[name].mean()) for cost in result.draws]
            spread.append(f"{sum(means) / len(means):+.4f} (least {min(means):+.4f})")
        table.add_row(f"{len(result.draws)} random draws", str(len(result.draws[0].kv_groups)), *spread)
    table.add_row("none: the loss itself", "0", *(f"{result.base[name].mean:.4f}" for name in names))
    return table
