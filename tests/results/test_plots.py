"""Pictures: the matplotlib figure and what a terminal shows, with colour and without."""

import io
import math
import os
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from fastheads.errors import MissingExtraError
from fastheads.results import plots
from fastheads.results.head_profile import RANKING_METRIC, HeadProfile
from fastheads.run import terminal
from fastheads.run.progress import Status
from fastheads.stats.moments import Moments

OTHER = "head_output_norm"


def make(means: list[list[float]], layers: list[int] | None = None, **metadata) -> HeadProfile:
    """A profile with these means, of two samples each a quarter above and below; NaN: no such head."""
    values = torch.tensor(means, dtype=torch.float64)
    layers = layers or list(range(len(means)))
    moments = Moments.of(torch.stack([values * 0.75, values * 1.25]))
    moments = moments._replace(nonfinite=torch.zeros_like(moments.count))
    sites = [
        {"name": f"layers.{layer}", "layer": layer, "num_heads": len(row), "head_dim": 8}
        for layer, row in zip(layers, means, strict=True)
    ]
    base = {"model": "some/tiny", "sites": sites, "token_agg": "all", "skip_first": 0}
    return HeadProfile({RANKING_METRIC: moments, OTHER: moments}, base | metadata)


@pytest.fixture
def profile() -> HeadProfile:
    return make([[1.0, 2.0, 3.0], [0.5, 4.0, math.nan]], layers=[0, 7])


@pytest.fixture
def wide() -> HeadProfile:
    return make([[1 + row + 7 * head for head in range(40)] for row in range(3)])


def test_the_heatmap_shows_the_means_by_layer_and_head(profile):
    figure = profile.plot()
    axes, bar = figure.axes
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[1, 2, 3], [0.5, 4, np.nan]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "7"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel().startswith(f"mean of {RANKING_METRIC}")
    assert "tiny" in axes.get_title(loc="left")


def test_any_metric_and_stat_can_be_drawn(profile):
    figure = profile.plot(OTHER, "std")
    shown = figure.axes[0].images[0].get_array()
    assert shown[1, 1] == pytest.approx(math.sqrt(2), rel=1e-12)  # of 3 and 5
    assert figure.axes[1].get_ylabel() == f"std of {OTHER}"
    with pytest.raises(ValueError, match="unknown stat 'size': choose one of mean, var"):
        profile.plot(stat="size")
    with pytest.raises(ValueError, match="no metric 'size'"):
        profile.plot("size")


def test_the_highest_and_the_lowest_are_marked(wide):
    marked = {c.get_label(): c.get_offsets().tolist() for c in wide.plot().axes[0].collections}
    lowest = [[head, row] for row, head in wide.ranked_cells()[:10]]
    highest = [[head, row] for row, head in wide.ranked_cells()[-10:]]
    assert marked == {"the 10 lowest": lowest, "the 10 highest": highest}


def test_a_picture_is_written_whole(profile, tmp_path, monkeypatch):
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for suffix, start in starts.items():
        path = tmp_path / "new" / f"p{suffix}"
        plots.save_heatmap(profile, path, RANKING_METRIC)
        assert path.read_bytes().startswith(start)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        plots.save_heatmap(profile, path, OTHER)
    assert path.read_bytes() == before
    assert len(os.listdir(path.parent)) == 3


def test_odd_names_and_empty_profiles_can_be_drawn(tmp_path):
    empty = make([[math.nan, math.nan]], model="a$_{$", data={"tokens": 0, "complete": False})
    plots.save_heatmap(empty, tmp_path / "p.png", RANKING_METRIC)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["p", "p.bmp", "p.png.txt"])
def test_a_suffix_that_names_no_picture_is_refused(profile, tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.pdf, \.svg"):
        plots.save_heatmap(profile, tmp_path / name, RANKING_METRIC)
    assert os.listdir(tmp_path) == []


def test_without_matplotlib_the_error_names_the_extra(profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastheads\[plot\]'"):
        profile.plot()


def console(width: int = 80, encoding: str = "utf-8", **options) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    return Console(file=file, width=width, highlight=False, **options)


def printed(
    profile: HeadProfile, console: Console, metric: str = RANKING_METRIC, listed: int | None = 10
) -> str:
    terminal.show(profile, metric, console, listed)
    console.file.flush()
    return console.file.buffer.getvalue().decode()


def rows_of_tables(out: str, cells: int) -> list[list[str]]:
    lines = [line.split() for line in out.splitlines()]
    return [line for line in lines if len(line) == cells and all(cell[0].isdigit() for cell in line)]


HIGHEST_FIRST = [
    ["7", "1", "4", "1.41"],
    ["0", "2", "3", "1.06"],
    ["0", "1", "2", "0.707"],
    ["0", "0", "1", "0.354"],
    ["7", "0", "0.5", "0.177"],
]


def test_the_tables_list_heads_from_either_end(profile):
    rows = rows_of_tables(printed(profile, console(), listed=2), 8)
    assert [row[:4] for row in rows] == HIGHEST_FIRST[:2]
    assert [row[4:] for row in rows] == HIGHEST_FIRST[:-3:-1]


@pytest.mark.parametrize("listed", [3, 10, None])
def test_where_two_tables_would_hold_all_heads_one_does(profile, listed):
    out = printed(profile, console(), listed=listed)
    assert rows_of_tables(out, 4) == HIGHEST_FIRST
    assert "5 heads, highest first" in out
    assert "lowest" not in out


def test_without_colour_the_heatmap_has_shades(profile):
    lines = printed(profile, console()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["head", "0", "1", "2"])
    assert lines[start + 1].rstrip() == "    0     ▒▒▒▒▓▓▓▓"  # fifths of 0.5 to 4
    assert lines[start + 2].rstrip() == "    7     ████ ·"
    assert lines[start + 4].split()[0] == "0.5"
    assert lines[start + 4].split()[-1] == "4"


def test_an_ascii_terminal_gets_ascii(profile):
    out = printed(profile, console(encoding="ascii"))
    assert out.isascii()
    assert "@@@@" in out


def test_a_colour_terminal_gets_viridis(profile):
    options = {"force_terminal": True, "color_system": "truecolor", "_environ": {}}
    out = printed(profile, console(**options))
    assert "\x1b[48;2;253;231;37m    \x1b[0m" in out  # the highest
    assert "\x1b[48;2;68;1;84m    \x1b[0m" in out  # the lowest
    assert "█" not in out
    assert "█" in printed(profile, console(**options, no_color=True))
    assert "█" in printed(profile, console(**{**options, "color_system": "standard"}))


@pytest.mark.parametrize("width", [10, 20, 33, 50, 72, 80, 200])
def test_every_line_fits_and_every_head_is_there(wide, width):
    out = printed(wide, console(width=width))
    assert max(map(len, out.splitlines())) <= width
    heatmap = out[out.index(" head 0") :].splitlines()
    second_row = "".join(line[6:] for line in heatmap if line[:6].strip() == "1")
    assert len(second_row) == 40 * min(max((width - 6) // 40, 1), 4)
    assert second_row == "".join(
        sorted(second_row, key=terminal.SHADES.index)
    )  # its means grow with the head


FIVES = "".join(f"{head:<5}" for head in range(0, 96, 5))[:96]


@pytest.mark.parametrize(
    ("heads", "width", "lines"),
    [
        (3, 18, ["0   1   2"]),  # four columns a head
        (12, 30, ["0   2   4   6   8   10"]),  # two
        (12, 18, ["0    5    10"]),  # one
        (104, 102, [FIVES, "    100"]),  # eight more in a block of their own
        (102, 102, [FIVES, "    10"]),  # where the last number does not fit
    ],
)
def test_ticks_stand_above_their_heads(heads, width, lines):
    shown = printed(make([[float(head) for head in range(heads)]]), console(width=width))
    found = [line.removeprefix(" head ") for line in shown.splitlines() if line.startswith(" head ")]
    assert [line.rstrip() for line in found] == lines


def test_the_summary_says_what_was_measured():
    data = {"source": "a.txt", "tokens": 12345, "sequences": 67, "complete": False}
    out = printed(make([[1.0, 2.0]], data=data), console())
    for said in ("some/tiny: 1 layers of 2 heads", "a.txt", "12,345 tokens in 67 sequences (incomplete)"):
        assert said in out
    assert "2 sequences a head, token_agg all" in out
    assert "(incomplete)" not in printed(make([[1.0]], data=data | {"complete": True}), console())


def test_a_profile_without_samples_says_so():
    assert "no head has samples" in printed(make([[math.nan]]), console())


@pytest.mark.parametrize("width", [40, 60, 100])
def test_progress_on_a_terminal_is_one_bar(width):
    out = console(width=width, force_terminal=True, _environ={})
    with terminal.progress_bar(out) as report:
        for done in (0, 500, 1000):
            report(Status(done, done, 1000, 1000))
    out.file.flush()
    text = out.file.buffer.getvalue().decode()
    assert "1,000/1,000" in text
    assert "━" in text or width < terminal.BAR_FROM


def test_an_unknown_total_is_no_error():
    for options in ({}, {"force_terminal": True}):
        with terminal.progress_bar(console(**options)) as report:
            report(Status())
            report(Status(10, 10))
