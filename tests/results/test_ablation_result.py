"""AblationResult: its tables against algebra, its plot, and files that lie."""

import copy
import json

import numpy as np
import pytest

from fastheads.errors import AblationFileError, MissingExtraError, OptionError
from fastheads.results.ablation import AblationResult, Curve, Draws, EachHead
from fastheads.results.ablation_plot import save_plot
from fastheads.stats.intervals import bootstrap_interval

FRACTIONS = [0.25, 0.5]


def drawn(n=16, draws=5, seed=0):
    generator = np.random.default_rng(seed)

    def values(*shape):
        return generator.normal(0.3, 0.2, shape)

    heads = [[(0, 1)], [(0, 1), (1, 0)]]
    several = [[[(1, d % 4)] for d in range(draws)], [[(1, d % 4), (0, 0)] for d in range(draws)]]
    return AblationResult(
        mode="zero",
        base=values(n) + 3,
        curves=[Curve("head_residual_ratio", FRACTIONS, heads, values(2, n), values(2, n))],
        random=Draws(None, FRACTIONS, several, values(2, draws, n), values(2, draws, n)),
        matched=[Draws("head_residual_ratio", FRACTIONS, several, values(2, draws, n), values(2, draws, n))],
        each_head=EachHead([(0, 0), (0, 1), (1, 0)], values(3, n), values(3, n)),
        about={"model": "tiny", "data": {"source": "text", "seq_len": 8}},
    )


def test_the_table():
    result = drawn()
    rows = result.table()
    assert [(row["metric"], row["fraction"], row["heads"], row["draws"]) for row in rows] == [
        ("head_residual_ratio", 0.25, 1, 5),
        ("head_residual_ratio", 0.5, 2, 5),
    ]
    for n, row in enumerate(rows):
        rise = result.curves[0].rise[n]
        assert row["rise"] == pytest.approx(rise.mean())
        assert row["median"] == pytest.approx(np.median(rise))
        assert row["kl"] == pytest.approx(result.curves[0].kl[n].mean())
        assert row["low"] < row["rise"] < row["high"]
        for name, draws in (("random", result.random), ("matched", result.matched[0])):
            means = draws.rise[n].mean(-1)
            assert row[f"{name}_mean"] == pytest.approx(means.mean())
            assert row[f"{name}_least"] == pytest.approx(means.min())
            assert row[f"{name}_below"] == sum(mean < rise.mean() for mean in means)


def test_single_heads_are_ordered_by_their_effect():
    result = drawn()
    rows = result.each_head_table()
    assert [row["kl"] for row in rows] == sorted(result.each_head.kl.mean(-1), reverse=True)
    first = result.each_head.heads.index((rows[0]["layer"], rows[0]["head"]))
    assert rows[0]["rise"] == pytest.approx(result.each_head.rise[first].mean())
    assert rows[0]["kl_low"] < rows[0]["kl"] < rows[0]["kl_high"]


def test_the_bootstrap_interval_covers_the_mean():
    generator = np.random.default_rng(0)
    low, high = bootstrap_interval(generator.normal(size=(400, 64)))
    assert 0.91 < ((low < 0) & (high > 0)).mean() < 0.98
    np.testing.assert_allclose((high - low).mean(), 2 * 1.96 / 8, rtol=0.05)
    assert np.isnan(bootstrap_interval(np.ones((3, 1)))).all()
    np.testing.assert_allclose(bootstrap_interval(np.ones((3, 4))), 1.0)


def test_a_file_holds_all_of_it(tmp_path):
    result = drawn()
    result.save(tmp_path / "new" / "r.json")
    again = AblationResult.load(tmp_path / "new" / "r.json")
    assert again.to_json() == result.to_json()
    assert again.table() == result.table()
    assert again.curves[0].heads == result.curves[0].heads
    bare = AblationResult("mean", np.zeros(3), [])
    assert AblationResult.from_json(bare.to_json()).to_json() == bare.to_json()
    assert bare.table() == bare.each_head_table() == []


DOCUMENT = json.loads(drawn(n=3).to_json())


def changed(**paths):
    """The document with other values at "a__0__b"."""
    document = copy.deepcopy(DOCUMENT)
    for path, value in paths.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("__")]
        inner = document
        for part in parents:
            inner = inner[part]
        inner[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1, 2]",
        "[" * 100_000,
        b"\xff\xfe\x00",
        "{}",
        changed(format="fastheads.plan"),
        changed(version=2),
        changed(mode="max"),
        changed(complete=1),
        changed(about=[]),
        changed(base=None),
        changed(base={"loss": [1.0, None, 2.0]}),
        changed(base={"loss": [1.0]}),
        changed(base={"loss": [True, 1.0, 2.0]}),
        changed(curves={}),
        changed(curves__0="x"),
        changed(curves__0__metric=3),
        changed(curves__0__fractions=[0.0, 0.5]),
        changed(curves__0__fractions=[0.5]),
        changed(curves__0__fractions=[0.5, 2]),
        changed(curves__0__heads=[[[0, 1]], [[0, -1]]]),
        changed(curves__0__heads=[[[0, 1]], [[0, 1, 2]]]),
        changed(curves__0__heads=[[[0, 1]], [[0, 1.5]]]),
        changed(curves__0__rise=[[1.0, 2.0, 3.0]]),
        changed(curves__0__rise=[[1.0, 2.0, 3.0], [1.0, 2.0]]),
        changed(curves__0__rise=[[1.0, 2.0, 3.0], [1.0, 2.0, 10**400]]),
        changed(curves__0__kl=[[1.0, 2.0, float("inf")], [1.0, 2.0, 3.0]]),
        changed(random=[]),
        changed(random__heads=[[], []]),
        changed(random__heads__0=[[[0, 1]]]),
        changed(random__rise=[[[1.0]], [[1.0]]]),
        changed(matched={}),
        changed(matched__0__metric=None),
        changed(each_head=[]),
        changed(each_head__heads=[[0, 0]]),
        changed(each_head__kl=[[0.0, 1.0, 2.0]]),
    ],
)
def test_files_that_lie_are_refused(text, tmp_path):
    with pytest.raises(AblationFileError) as raised:
        AblationResult.from_json(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(AblationFileError, match=r"r\.json: "):
        AblationResult.load(path)


def test_the_unchanged_document_is_read():
    assert AblationResult.from_json(changed()).sequences == 3


def test_a_file_that_is_missing_or_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        AblationResult.load(tmp_path / "none.json")
    with pytest.raises(OSError):
        AblationResult.load(tmp_path)


def test_the_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    result = drawn()
    axes = result.plot()
    assert result.plot(axes) is axes
    labels = [text.get_text() for text in result.plot().get_legend().get_texts()]
    assert labels == [
        "random: mean and range of 5 draws",
        "random, as many in each layer",
        "lowest by head_residual_ratio",
    ]
    for suffix in ("png", "pdf", "svg"):
        save_plot(result, tmp_path / f"p.{suffix}")
        assert (tmp_path / f"p.{suffix}").stat().st_size > 1_000
    with pytest.raises(OptionError, match=r"must end in one of \.png"):
        save_plot(result, tmp_path / "p.txt")
    for other in (drawn(n=1), AblationResult("mean", np.zeros(3), [], complete=False)):
        other.plot()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError):
        result.plot()
