"""The page of a report: what is in the file. `test_report_browser.py` opens it."""

import base64
import gzip
import hashlib
import html.parser
import itertools
import json
import re
import struct

import numpy as np
import pytest
from drawn_profiles import HOSTILE, made_up, shapes

from fastheads import HeadProfile
from fastheads.errors import OptionError
from fastheads.results.ablation import AblationResult, Curve, Draws
from fastheads.results.report.ablation import curves_of
from fastheads.results.report.page import page
from fastheads.results.report.payload import Named
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC

TYPES = {"f4": np.float32, "f8": np.float64, "u4": np.uint32, "u1": np.uint8}
SHAPES = shapes()


class Parsed(html.parser.HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style", "title"):
            self.inside = (tag, dict(attributes))
            self.texts.append("")

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[0]:
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def parts(text):
    """The title, the style, the data and the script of a page."""
    return Parsed(text).texts


def data_of(text):
    """The header, with the planes of each metric as arrays, decoded as the format says."""
    raw = gzip.decompress(base64.b64decode(parts(text)[2]))
    (length,) = struct.unpack_from("<I", raw)
    header, at = json.loads(raw[4 : 4 + length]), 4 + length
    for profile in header["profiles"]:
        shape = profile["rows"], profile["heads"]
        for metric in profile["metrics"]:
            for name, kind in metric["planes"]:
                n, dtype = shape[0] * shape[1], np.dtype(TYPES[kind])
                plane = np.frombuffer(raw, np.uint8, n * dtype.itemsize, at).reshape(dtype.itemsize, n).T
                metric[name] = np.ascontiguousarray(plane).view(dtype).reshape(shape)
                at += n * dtype.itemsize
    assert at == len(raw)
    return header


def made(profile, **more):
    return page([Named("p", profile)], **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_data_of_the_page_are_those_of_the_profile(shape):
    profile = SHAPES[shape]
    (found,) = data_of(made(profile))["profiles"]
    assert (found["rows"], found["heads"], found["layers"]) == (*profile.shape, profile.layers)
    assert [metric["name"] for metric in found["metrics"]] == list(profile.metrics)
    for metric in found["metrics"]:
        stats = profile[metric["name"]]
        np.testing.assert_array_equal(metric["mean"], stats["mean"].astype(np.float32))
        np.testing.assert_array_equal(metric["sem"], stats["sem"].astype(np.float32))
        np.testing.assert_array_equal(metric["count"], stats["count"])
        by_rank = {
            int(metric["rank"][cell]): cell for cell in np.ndindex(profile.shape) if metric["rank"][cell]
        }
        assert [by_rank[rank] for rank in range(1, metric["ranked"] + 1)] == profile.ranked_cells(
            metric["name"], descending=True
        )


def test_ties_are_those_of_the_tables():
    profile = made_up(4, 6, metrics=[RATIO_METRIC])
    stats = profile[RATIO_METRIC]
    cells = profile.ranked_cells(descending=True)
    near = [
        stats["mean"][a] - stats["mean"][b] <= 1.96 * np.hypot(stats["sem"][a], stats["sem"][b])
        for a, b in itertools.pairwise(cells)
    ]
    wanted = {
        cell for cells_of in zip(cells, cells[1:], near, strict=False) if cells_of[2] for cell in cells_of[:2]
    }
    (found,) = data_of(made(profile))["profiles"]
    assert {tuple(cell) for cell in np.argwhere(found["metrics"][0]["tied"]).tolist()} == wanted
    assert 0 < len(wanted) < len(cells)


def test_values_beyond_single_precision_are_kept_in_double():
    profile = made_up(2, 3, metrics=[RATIO_METRIC])
    for factor in (1e-200, 1e100):
        arrays = profile.arrays[RATIO_METRIC]
        scaled = arrays._replace(mean=arrays.mean * factor, m2=arrays.m2 * factor * factor)
        (found,) = data_of(made(HeadProfile({RATIO_METRIC: scaled}, profile.metadata)))["profiles"]
        np.testing.assert_array_equal(found["metrics"][0]["mean"], scaled.mean)


def test_the_page_is_one_file_that_may_load_nothing():
    text = made(SHAPES["30x9"])
    parsed = Parsed(text)
    loading = {"src", "href", "srcset", "action", "data", "background", "poster"}
    assert not [tag for tag in parsed.tags if loading & tag[1].keys()]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import|url\(|import\s*\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", parts(text)[3]
    )
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    _, style, _, script = parts(text)
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_text_of_a_file_is_data_and_nothing_else():
    evil = made(SHAPES["hostile"])
    assert [tag for tag, _ in Parsed(evil).tags] == [tag for tag, _ in Parsed(made(SHAPES["one"])).tags]
    assert not set(evil) & {"\x00", "\x1b", "\u202e"}
    (found,) = data_of(evil)["profiles"]
    shown = HOSTILE.replace("\x00", "?").replace("\x1b", "?").replace("\u202e", "?")
    assert found["model"] == shown
    about = {name: text for _, lines in found["about"] for name, text in lines}
    assert about["source"] == about[shown] == shown
    json.dumps(about).encode()  # no lone surrogates
    assert parts(evil)[0] == f"{shown}: attention heads"


def test_a_large_model_fits_in_a_megabyte_and_a_half():
    assert SHAPES["126x128"].shape == (126, 128) and len(SHAPES["126x128"].metrics) == 8
    assert len(made(SHAPES["126x128"]).encode()) <= 1.5e6
    assert len(made(SHAPES["one"]).encode()) < 60_000


def test_colours_suit_the_metric():
    (found,) = data_of(made(SHAPES["30x9"]))["profiles"]
    colours = {metric["name"]: metric["colours"] for metric in found["metrics"]}
    relative = colours[METRICS[3]]
    assert (relative["kind"], relative["centre"]) == ("diverging", 1.0)
    assert relative["low"] < 1 < relative["high"]
    assert (colours[RATIO_METRIC]["kind"], colours[RATIO_METRIC]["low"]) == ("linear", 0.0)
    assert colours[METRICS[0]]["kind"] == "log"
    mean = SHAPES["30x9"][METRICS[0]]["mean"]
    assert (
        mean.min() < colours[METRICS[0]]["low"] < np.median(mean) < colours[METRICS[0]]["high"] < mean.max()
    )


def test_kv_groups_are_told_where_they_are_known():
    (found,) = data_of(made(SHAPES["ragged"]))["profiles"]
    assert found["kv"] == [2] * 6
    without = [metric for metric in SHAPES["30x9"].metrics if metric != KV_METRIC]
    (found,) = data_of(made(made_up(30, 9, metrics=without)))["profiles"]
    assert found["kv"] == [None] * 30
    (found,) = data_of(made(made_up(2, 9, metrics=without, kv_heads=[3, 4])))["profiles"]
    assert found["kv"] == [3, None]  # 9 heads cannot share 4


def test_a_report_is_written_whole_and_names_its_kind(tmp_path):
    profile = SHAPES["one"]
    profile.report(tmp_path / "new" / "r.html")
    assert data_of((tmp_path / "new" / "r.html").read_text())["profiles"][0]["model"] == "some/model"
    with pytest.raises(OptionError, match=r"must end in \.html or \.htm, not 'r.pdf'"):
        profile.report(tmp_path / "r.pdf")
    with pytest.raises(OptionError, match="a report needs a profile"):
        page([])


def test_several_profiles_share_a_page():
    named = [Named("a", SHAPES["30x9"], {"name": "a.safetensors"}), Named("b", SHAPES["one"])]
    header = data_of(page(named))
    assert [profile["name"] for profile in header["profiles"]] == ["a", "b"]
    assert header["profiles"][0]["about"][0] == ["File", [["name", "a.safetensors"]]]


def test_a_notebook_gets_the_page_in_a_frame_of_its_own():
    ((tag, attributes),) = Parsed(SHAPES["hostile"]._repr_html_()).tags
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert data_of(attributes["srcdoc"])["profiles"][0]["rows"] == 4


def test_the_curves_of_an_ablation_are_means_with_intervals():
    rise = np.array([[0.0, 0.2], [1.0, 3.0]])  # fractions, sequences
    drawn = np.array([[[0.0, 2.0], [3.0, 5.0]], [[2.0, 2.0], [4.0, 4.0]]])  # fractions, draws, sequences
    fractions, none = [0.1, 0.2], [[], []]
    result = AblationResult(
        mode="zero",
        base=np.array([2.0, 4.0]),
        curves=[Curve(HOSTILE, fractions, none, rise, rise)],
        random=Draws(None, fractions, [none, none], drawn, drawn),
    )
    found = curves_of(result)
    line, random = found["lines"]
    assert [point[:2] for point in line["points"]] == [[0.1, 0.1], [0.2, 2.0]]
    assert all(0 <= low <= mean <= high <= 3 for _, mean, low, high in line["points"])
    assert random == {"name": "random: 2 draws", "points": [[0.1, 2.5, 1.0, 4.0], [0.2, 3.0, 2.0, 4.0]]}
    assert "replaced by zero, on 2 sequences; the intact model's loss is 3." in found["text"]
    assert "\x1b" not in line["name"]
    assert data_of(made(SHAPES["one"], curves=found))["ablation"] == found
