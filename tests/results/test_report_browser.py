"""The page of a report in Chromium: `pytest -m browser` alone, with the extra `browser` installed.

The environment variable CHROMIUM names the program; without it Playwright's own is used.
"""

import os
import re

import pytest
from drawn_profiles import HOSTILE, made_up, shapes

from fastheads.results.report.page import page
from fastheads.results.report.payload import Named
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC

pytestmark = pytest.mark.browser

SHAPES = shapes()
POINTS = [[0.05, 0.1, 0.05, 0.15], [0.1, 0.4, 0.3, 0.5], [0.2, 1.2, None, None]]
CURVES = {"text": HOSTILE, "unit": "rise in loss", "lines": [{"name": HOSTILE, "points": POINTS}]}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Open a page in a new window; at the end there must have been no message, no error and no request but for the file."""
    heard = []

    def opened(text, width=1300, height=900, **options):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        path.write_text(text)
        window = chromium.new_page(viewport={"width": width, "height": height}, **options)
        window.on("console", lambda message: heard.append(message.text))
        window.on("pageerror", lambda error: heard.append(str(error)))
        window.on("dialog", lambda dialog: heard.append(dialog.message))
        window.on(
            "request", lambda request: heard.append(request.url) if request.url != path.as_uri() else None
        )
        window.goto(path.as_uri())
        window.wait_for_selector("html[data-ready]", timeout=20_000)
        return window

    yield opened
    assert heard == []


def of(profile, **more):
    return page([Named("p", profile)], **more)


def rows_of(window):
    return window.eval_on_selector_all(
        "#body tr[data-head]", "lines => lines.map(line => [...line.cells].map(cell => cell.textContent))"
    )


def place_of(window, row, head):
    """Where a head of the heatmap is in the window."""
    box = window.locator("#map").bounding_box()
    left, top, width, height = map(float, window.get_attribute("#map", "data-grid").split(","))
    return box["x"] + left + (head + 0.5) * width, box["y"] + top + (row + 0.5) * height


def point_at(window, row, head):
    window.mouse.move(*place_of(window, row, head))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1300])
def test_every_metric_of_every_shape_is_drawn_without_a_word(opened, shape, scheme, width):
    window = opened(of(SHAPES[shape], curves=CURVES), width=width, color_scheme=scheme)
    assert not window.text_content("#message")
    for number in range(len(SHAPES[shape].metrics)):
        window.select_option("#metric", str(number))
        for colours in ("auto", "linear", "log", "rank"):
            window.select_option("#colours", colours)
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expected = "no head has samples" if shape == "nan" else ""
    assert expected in window.text_content("#note")


def test_the_heatmap_has_the_colours_of_the_ranks(opened):
    profile = made_up(3, 5, metrics=[RATIO_METRIC])
    window = opened(of(profile))
    (highest, lowest) = profile.ranked_cells(descending=True)[0], profile.ranked_cells()[0]
    window.select_option("#colours", "rank")
    window.focus("#rows")
    window.keyboard.press("ArrowDown")  # the outline of the chosen head is elsewhere
    read = """cells => {
        const c = document.getElementById("map"), [left, top, w, h] = c.dataset.grid.split(",").map(Number);
        const scale = c.width / parseFloat(c.style.width), all = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return cells.map(([row, head]) => {
            const [x, y] = [left + (head + 0.5) * w, top + (row + 0.5) * h].map(place => Math.round(place * scale));
            return [...all.slice(4 * (y * c.width + x), 4 * (y * c.width + x) + 3)];
        });
    }"""
    colours = window.evaluate(read, [list(highest), list(lowest)])
    assert colours == [[253, 231, 37], [68, 1, 84]]


def test_no_mean_is_beyond_a_limit_by_rounding(opened):
    window = opened(of(made_up(1, 1, metrics=[RATIO_METRIC])))
    window.select_option("#colours", "auto")
    assert "≥" not in window.get_attribute("#legend", "aria-label")
    assert window.text_content("#summary").startswith("1 layer of 1 head; ")


def test_a_head_is_described_where_the_mouse_is(opened):
    profile = SHAPES["30x9"]
    window = opened(of(profile))
    assert window.is_hidden("#tip")
    point_at(window, 12, 4)
    stats = profile[RATIO_METRIC]
    rank = profile.ranked_cells(RATIO_METRIC, descending=True).index((12, 4)) + 1
    said = window.inner_text("#tip").split("\n")
    assert said[0] == "layer 12, head 4"
    mean, sem = re.match(r"([\d.]+) ± ([\d.]+)", said[1]).groups()
    assert float(mean) == pytest.approx(stats["mean"][12, 4], rel=1e-2)
    assert float(sem) == pytest.approx(stats["sem"][12, 4], rel=5e-2)
    assert said[2].startswith(f"rank {rank} of 270, 1 is the highest")
    assert said[3] == "KV group 1: heads 3 to 5"
    assert said[4] == "40 samples; model.layers.12.self_attn.o_proj"
    window.select_option("#metric", label=KV_METRIC)
    point_at(window, 12, 1)
    assert window.inner_text("#tip").startswith("layer 12, KV head 1\n")
    window.mouse.move(5, 5)
    assert window.is_hidden("#tip")


def test_the_table_is_the_ranking_and_sorts(opened):
    profile = SHAPES["126x128"]
    window = opened(of(profile))
    cells = profile.ranked_cells(RATIO_METRIC, descending=True)
    found = [(int(row[1]), int(row[2])) for row in rows_of(window)]
    assert found == cells[: len(found)] and 15 < len(found) < 60
    window.click("[data-sort=rank]")
    assert [(int(row[1]), int(row[2])) for row in rows_of(window)][:10] == cells[:-11:-1]
    assert window.get_attribute("th:has([data-sort=rank])", "aria-sort") == "descending"
    window.click("[data-sort=sem]")
    sem = [float(row[4].removeprefix("±")) for row in rows_of(window)]
    assert sem == sorted(sem) and sem[0] == pytest.approx(profile[RATIO_METRIC]["sem"].min(), abs=1e-4)
    # The middle of 16,128 rows is shown when it is scrolled to.
    window.click("[data-sort=rank]")
    window.evaluate("document.getElementById('rows').scrollTop = 26 * 8000")
    window.wait_for_function("+document.querySelector('#body tr[data-head]').cells[0].textContent > 7900")
    assert window.get_attribute("#table", "aria-rowcount") == "16129"


def test_the_table_filters(opened):
    profile = SHAPES["30x9"]
    window = opened(of(profile))
    window.fill("#only-layers", "3, 5-6")
    window.fill("#only-heads", "0-1")
    assert window.text_content("#found") == "6 of 270"
    assert sorted((int(row[1]), int(row[2])) for row in rows_of(window)) == [
        (layer, head) for layer in (3, 5, 6) for head in (0, 1)
    ]
    window.fill("#only-layers", "three")
    assert window.get_attribute("#only-layers", "aria-invalid") == "true"
    window.fill("#only-layers", "")
    window.fill("#only-heads", "")
    window.select_option("#only", "low")
    assert window.text_content("#found") == "27 of 270"
    shown = rows_of(window)
    assert min(int(row[0]) for row in shown) == 244
    window.select_option("#only", "tied")
    assert {row[5] for row in rows_of(window)} == {"~"}


def test_the_keyboard_reaches_everything(opened):
    profile = SHAPES["ragged"]
    window = opened(of(profile))
    window.focus("#map")
    for key in ("Home", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "End"):
        window.keyboard.press(key)
    assert window.text_content("#head-text").startswith("layer 3, head 7 ")  # the row has eight
    window.keyboard.press("ArrowDown")
    assert window.text_content("#head-text").startswith("layer 4, head 3 ")
    window.focus("#rows")
    window.keyboard.press("ArrowDown")
    chosen = window.eval_on_selector_all(
        "#body tr.chosen", "lines => lines.map(line => line.cells[0].textContent)"
    )
    ranked = profile.ranked_cells(RATIO_METRIC, descending=True)
    assert chosen == [str(min(ranked.index((2, 3)) + 2, len(ranked)))]
    order = []
    for _ in range(40):
        window.keyboard.press("Tab")
        order.append(window.evaluate("document.activeElement.id"))
    assert {"metric", "colours", "map", "only-layers", "only", "rows", "scatter", "across", "up"} <= set(
        order
    )


def test_a_head_can_be_kept(opened):
    window = opened(of(SHAPES["30x9"]))
    point_at(window, 3, 3)
    window.mouse.click(*place_of(window, 3, 3))
    point_at(window, 9, 0)
    assert window.text_content("#head-text").startswith("layer 3, head 3 ")
    metrics = window.eval_on_selector_all(
        "#head-table tbody th", "cells => cells.map(cell => cell.textContent)"
    )
    assert metrics == [name for name in SHAPES["30x9"].metrics if name != KV_METRIC]
    window.mouse.click(*place_of(window, 3, 3))
    point_at(window, 9, 0)
    assert window.text_content("#head-text").startswith("layer 9, head 0 ")


def test_two_metrics_and_their_correlation(opened):
    profile = made_up(6, 8, metrics=[METRICS[0], METRICS[3], RATIO_METRIC])
    window = opened(of(profile))
    window.select_option("#across", label=METRICS[0])
    window.select_option("#up", label=METRICS[0])
    assert "48 heads; Spearman's correlation 1.00" in window.text_content("#scatter-note")
    window.select_option("#up", label=METRICS[3])
    rank = [profile[m]["mean"].ravel().argsort().argsort() for m in (METRICS[0], METRICS[3])]
    rho = ((rank[0] - 23.5) * (rank[1] - 23.5)).sum() / ((rank[0] - 23.5) ** 2).sum()
    assert f"correlation {rho:.2f}." in window.text_content("#scatter-note")


def test_several_profiles_are_chosen_from(opened):
    second = made_up(30, 9, seed=5, model="second")
    window = opened(page([Named("a", SHAPES["30x9"]), Named(HOSTILE, second), Named("c", SHAPES["one"])]))
    assert window.text_content("h1") == "some/model"
    groups = window.eval_on_selector_all("#across optgroup", "groups => groups.map(g => g.label)")
    assert groups[0] == "a" and len(groups) == 2  # the third has other heads
    window.select_option("#profile", "1")
    assert window.text_content("h1") == "second"
    found = [(int(row[1]), int(row[2])) for row in rows_of(window)]
    assert found[:10] == second.ranked_cells(RATIO_METRIC, descending=True)[:10]


def test_text_of_a_file_does_nothing(opened):
    window = opened(of(SHAPES["hostile"], curves=CURVES))
    assert window.title() != "1" and window.locator("img").count() == 0
    assert window.locator("script").count() == 2
    shown = re.sub("[\x00\x1b\u202e]", "?", HOSTILE)
    assert window.text_content("h1") == shown
    assert shown in window.text_content("#about")
    assert window.text_content("#curve-legend") == HOSTILE  # is cleaned where it is read


def test_damaged_data_are_told(opened, chromium, tmp_path):
    text = of(SHAPES["one"])
    (tmp_path / "damaged.html").write_text(re.sub(r'(id="data">.{400})....', r"\1AAAA", text))
    window = chromium.new_page()
    window.goto((tmp_path / "damaged.html").as_uri())
    window.wait_for_function("document.getElementById('message').textContent")
    assert window.text_content("#message").startswith("The data of this page cannot be read: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", ["30x9", "ragged", "nan"])
def test_axe_finds_nothing(opened, shape, scheme):
    from axe_playwright_python.sync_playwright import Axe

    window = opened(of(SHAPES[shape], curves=CURVES), color_scheme=scheme, bypass_csp=True)
    found = Axe().run(window)
    assert found.violations_count == 0, found.generate_report()


def test_a_large_page_is_drawn_soon(opened):
    window = opened(of(SHAPES["126x128"]))
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    times = []
    for _ in range(3):
        window.reload()
        window.wait_for_selector("html[data-ready]")
        window.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
        times.append(window.evaluate(paint))
    assert min(times) <= 300, times


def test_a_frame_in_a_notebook_draws(opened, chromium, tmp_path):
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><title>n</title>{SHAPES['30x9']._repr_html_()}")
    window = chromium.new_page()
    heard = []
    window.on("console", lambda message: heard.append(message.text))
    window.goto((tmp_path / "notebook.html").as_uri())
    frame = window.frame_locator("iframe")
    frame.locator("#body tr[data-head]").first.wait_for()
    assert frame.locator("h1").text_content() == "some/model" and heard == []
