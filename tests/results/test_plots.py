"""Pictures: the matplotlib figure and what a terminal shows, with colour and without."""

import io
import math
import os
import sys

import numpy as np
import pytest
import torch
from drawn_profiles import made_up
from rich.console import Console

from fastheads.errors import MissingExtraError
from fastheads.results import plots
from fastheads.results.head_profile import RANKING_METRIC, HeadProfile
from fastheads.run import terminal
from fastheads.run.progress import Status
from fastheads.stats.moments import Moments
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC

OTHER = "head_output_norm"


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    """Draw without a display, and close what was drawn."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    yield
    plt.close("all")


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
    drawn = profile.plot()
    axes, bar = drawn.figure.axes
    assert drawn is axes
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[1, 2, 3], [0.5, 4, np.nan]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "7"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel().startswith(f"mean of {RANKING_METRIC}")
    assert axes.get_title(loc="left").split("\n") == [
        "tiny",
        f"mean of {RANKING_METRIC}",
        "2 sequences a head, token_agg all",
    ]


def test_any_metric_and_stat_can_be_drawn(profile):
    figure = profile.plot(OTHER, "std").figure
    shown = figure.axes[0].images[0].get_array()
    assert shown[1, 1] == pytest.approx(math.sqrt(2), rel=1e-12)  # of 3 and 5
    assert figure.axes[1].get_ylabel() == f"std of {OTHER}"
    with pytest.raises(ValueError, match="unknown stat 'size': choose one of mean, var"):
        profile.plot(stat="size")
    with pytest.raises(ValueError, match="no metric 'size'"):
        profile.plot("size")


def test_the_highest_and_the_lowest_are_marked(wide):
    marked = {c.get_label(): c.get_offsets().tolist() for c in wide.plot().collections}
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
    profile: HeadProfile, console: Console, metric: str | None = RANKING_METRIC, listed: int | None = 10
) -> str:
    terminal.show(profile, metric, console, listed)
    console.file.flush()
    return console.file.buffer.getvalue().decode()


def rows_of_tables(out: str, cells: int) -> list[list[str]]:
    lines = [line.split() for line in out.splitlines()]
    marks = ("±", "+", "~", "-")
    return [
        line
        for line in lines
        if len(line) == cells and all(cell[0].isdigit() or cell[0] in marks for cell in line)
    ]


HIGHEST_FIRST = [
    ["7", "1", "4.0000", "±1.0000", "~"],
    ["0", "2", "3.0000", "±0.7500", "~"],
    ["0", "1", "2.0000", "±0.5000", "~"],
    ["0", "0", "1.0000", "±0.2500", "~"],
    ["7", "0", "0.5000", "±0.1250", "~"],
]


def test_the_tables_list_heads_from_either_end(profile):
    rows = rows_of_tables(printed(profile, console(), listed=2), 10)
    assert [row[:5] for row in rows] == HIGHEST_FIRST[:2]
    assert [row[5:] for row in rows] == HIGHEST_FIRST[:-3:-1]


@pytest.mark.parametrize("listed", [3, 10, None])
def test_where_two_tables_would_hold_all_heads_one_does(profile, listed):
    out = printed(profile, console(), listed=listed)
    assert rows_of_tables(out, 5) == HIGHEST_FIRST
    assert "5 heads, highest first" in out
    assert "lowest" not in out


def with_spread(means: list[float], spread: float, squares: bool = False) -> HeadProfile:
    """One layer of heads with these means, of two samples each, so that the standard error is `spread`."""
    values = torch.tensor([means], dtype=torch.float64)
    samples = torch.stack([values - spread, values + spread])
    moments = {RATIO_METRIC: Moments.of(samples)}
    if squares:
        moments[RATIO_SQUARE_METRIC] = Moments.of(samples**2)
    sites = [{"name": "layers.3", "layer": 3, "num_heads": len(means), "head_dim": 8}]
    return HeadProfile(moments, {"model": "m", "sites": sites, "token_agg": "all"})


def test_heads_that_the_samples_do_not_tell_apart_are_marked_as_ties():
    # 1.96 √2 0.1 = 0.277
    out = printed(with_spread([1.0, 1.27, 5.0, 1.56], 0.1), console())
    assert rows_of_tables(out, 4) == [["3", "2", "5.000", "±0.100"], ["3", "3", "1.560", "±0.100"]]
    assert rows_of_tables(out, 5) == [["3", "1", "1.270", "±0.100", "~"], ["3", "0", "1.000", "±0.100", "~"]]
    line = "~ a tie: within 1.96 √(sem_a² + sem_b²) of a neighbour in the ranking"
    assert line in out and "independent" not in out
    out = printed(with_spread([1.0, 2.0], 0.1), console())
    assert "~" not in out
    tokens = with_spread([1.0, 1.0], 0.1)
    tokens.metadata["token_agg"] = "token"
    assert "sem takes tokens for independent" in printed(tokens, console())


def test_a_tie_beyond_the_listed_heads_is_marked_too():
    out = printed(with_spread([1.0, 1.1, 3.0, 4.0, 5.0], 0.1), console(), listed=1)
    assert rows_of_tables(out, 9) == [["3", "4", "5.000", "±0.100", "3", "0", "1.000", "±0.100", "~"]]


def test_of_one_sample_no_uncertainty_is_known():
    one = with_spread([1.0, 2.0], 0.0)
    one.moments = {RATIO_METRIC: Moments.of(torch.tensor([[[1.0, 2.0]]], dtype=torch.float64))}
    assert rows_of_tables(printed(one, console()), 5) == [
        ["3", "1", "2.000", "-", "~"],
        ["3", "0", "1.000", "-", "~"],
    ]


def test_the_ratio_has_its_root_mean_square_beside_it():
    out = printed(with_spread([1.0, 3.0], 0.5, squares=True), console(), RATIO_METRIC)
    assert rows_of_tables(out, 5) == [
        ["3", "1", "3.000", "±0.500", "3.041"],
        ["3", "0", "1.000", "±0.500", "1.118"],
    ]
    assert "rms: the root of the mean of the squares" in out
    assert "rms" not in printed(with_spread([1.0, 3.0], 0.5), console(), RATIO_METRIC)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_tables_fit_eighty_columns(squares, encoding):
    many = with_spread([0.01234 + 0.001 * head for head in range(30)], 0.0005678, squares=squares)
    out = printed(many, console(encoding=encoding))
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii() or encoding == "utf-8"


def test_what_is_shown_where_the_ratio_is_not_measured():
    def of(*metrics):
        whole = make([[1.0, 2.0], [3.0, 4.0]])
        return HeadProfile({metric: whole.moments[OTHER] for metric in metrics}, whole.metadata)

    line = "shown since this profile has no head_residual_ratio"
    for profile, shown, note in (
        (of(OTHER, METRICS[3]), METRICS[3], "1 is the layer's average"),
        (of(OTHER, METRICS[3], RATIO_METRIC), RATIO_METRIC, "relative to the residual stream"),
        (of(OTHER), OTHER, "grows with depth: compare heads within a layer only"),
    ):
        out = " ".join(printed(profile, console(), None).split())
        assert f"metric {shown} ({note})" in out
        assert (line in out) == (shown != RATIO_METRIC)
        label = profile.plot().figure.axes[1].get_ylabel()
        assert f"mean of {shown}\n({note})" in label
        assert (line in label) == (shown != RATIO_METRIC)
        asked = printed(profile, console(), OTHER) if OTHER in profile.metrics else ""
        assert line not in asked and line not in profile.plot(OTHER).figure.axes[1].get_ylabel()


def test_relative_means_have_colours_that_diverge_from_one():
    means = [[0.5, 1.0, 4.0]]
    profile = HeadProfile({METRICS[3]: make(means).moments[OTHER]}, make(means).metadata)
    image = profile.plot().images[0]
    np.testing.assert_allclose(image.norm(np.array([0.5, 1.0, 4.0])), [0, 0.5, 1])
    assert image.cmap.name != make(means).plot().images[0].cmap.name == "viridis"
    assert profile.plot(stat="std").images[0].cmap.name == "viridis"
    for same in (1.0, 2.0, 0.5, math.nan):
        one = HeadProfile({METRICS[3]: make([[same] * 3]).moments[OTHER]}, make(means).metadata)
        one.plot().figure.savefig(io.BytesIO(), format="png")


def test_without_colour_the_heatmap_has_shades(profile):
    lines = printed(profile, console()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["head", "0", "1", "2"])
    assert lines[start + 1].rstrip() == "    0 ░░░░▒▒▒▒▓▓▓▓"  # fifths of 0 to 4
    assert lines[start + 2].rstrip() == "    7     ████ ·"
    assert lines[start + 4].split()[0] == "0"
    assert lines[start + 4].split()[-1] == "4"


def test_an_ascii_terminal_gets_ascii(profile):
    out = printed(profile, console(encoding="ascii"))
    assert out.isascii()
    assert "@@@@" in out


def test_a_colour_terminal_gets_viridis(profile):
    options = {"force_terminal": True, "color_system": "truecolor", "_environ": {}}
    out = printed(profile, console(**options))
    assert "\x1b[48;2;253;231;37m    \x1b[0m" in out  # the highest
    assert "\x1b[48;2;68;1;84m \x1b[0m" in out  # zero, in the legend
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
    assert (second_row.count("▲"), second_row.count("▼")) == (3, 3)  # of the ten highest and lowest
    second_row = second_row.replace("▲", "█").replace("▼", " ")
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


def caption(axes) -> str:
    (legend,) = axes.figure.legends
    return " ".join(legend.get_title().get_text().split())


def test_the_caption_says_what_is_drawn_as_highest_and_lowest():
    profile = made_up(80, 64, kv=8)
    stats, ranked = profile[RATIO_METRIC], profile.ranked_cells(RATIO_METRIC)
    low, high = (
        [f"{stats['mean'][cell]:.4g}" for cell in ends]
        for ends in ((ranked[0], ranked[9]), (ranked[-10], ranked[-1]))
    )
    axes = profile.plot(RATIO_METRIC)
    assert caption(axes).startswith(
        f"Circles: the 10 highest, {high[0]} to {high[1]}; crosses: the 10 lowest, {low[0]} to {low[1]}; colours end at 0 and "
    )
    assert caption(axes).endswith("lines separate KV groups")
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "the 10 highest",
        "the 10 lowest",
    ]
    assert "the 3 highest" in caption(profile.plot(RATIO_METRIC, marked=3))
    assert "highest" not in caption(profile.plot(RATIO_METRIC, marked=0))


def test_ticks_of_a_large_model_are_multiples():
    axes = made_up(80, 64).plot()
    assert axes.get_xticks().tolist() == list(range(0, 64, 4))
    assert axes.get_yticks().tolist() == list(range(0, 80, 4))
    layers = [3 * n for n in range(80)]
    assert [t.get_text() for t in made_up(80, 64, layers=layers).plot().get_yticklabels()][:3] == [
        "0",
        "12",
        "24",
    ]


def test_lines_stand_between_kv_groups_of_each_row():
    profile = made_up(3, 8, kv=2, widths=[8, 4, 6])
    (lines,) = [c for c in profile.plot(OTHER).collections if hasattr(c, "get_segments")]
    assert [segment.tolist() for segment in lines.get_segments()] == [
        [[3.5, -0.5], [3.5, 0.5]],
        [[1.5, 0.5], [1.5, 1.5]],
        [[2.5, 1.5], [2.5, 2.5]],
    ]
    for metric, kv in ((OTHER, 1), (KV_METRIC, 2)):
        assert not [c for c in made_up(3, 8, kv=kv).plot(metric).collections if hasattr(c, "get_segments")]


def test_axes_colours_and_limits_can_be_given(profile):
    import matplotlib.pyplot as plt

    figure, (one, two) = plt.subplots(1, 2)
    assert profile.plot(ax=two, cmap="magma", vmin=1, vmax=2) is two
    image = two.images[0]
    assert (image.cmap.name, image.norm.vmin, image.norm.vmax) == ("magma", 1, 2)
    assert not one.images and "colours end at 1 and 2" in two.get_legend().get_title().get_text().lower()
    with pytest.raises(ValueError, match="vmin must be below vmax, not 3 and 2"):
        profile.plot(vmin=3, vmax=2)
    figure.savefig(io.BytesIO(), format="png")
    plt.close("all")


def test_a_saved_picture_leaves_no_figure_behind(profile, tmp_path):
    import matplotlib.pyplot as plt

    plt.close("all")
    plots.save_heatmap(profile, tmp_path / "p.png")
    assert plt.get_fignums() == []
    profile.plot()
    assert len(plt.get_fignums()) == 1
    plt.close("all")


def test_relative_means_in_a_terminal_have_colours_that_diverge_from_one():
    profile = HeadProfile(
        {METRICS[3]: make([[0.5, 1.0, 4.0]]).moments[OTHER]}, make([[0.5, 1.0, 4.0]]).metadata
    )
    out = printed(profile, console(force_terminal=True, color_system="truecolor", _environ={}), METRICS[3])
    assert "\x1b[48;2;247;247;247m    \x1b[0m" in out and "\x1b[48;2;45;0;75m    \x1b[0m" in out
    assert "in the middle: 1" in out
