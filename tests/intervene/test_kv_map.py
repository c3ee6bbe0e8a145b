"""Maps of KV groups: what they choose, their files, and DuoAttention's format."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastheads import HookManager
from fastheads.backends.streaming_attention import Window
from fastheads.errors import KvMapError, OptionError, ResultsError
from fastheads.intervene.kv_map import DuoPattern, KvMap, kv_map
from fastheads.intervene.streaming import AttentionMass, streaming
from fastheads.intervene.streaming_loss import (
    REPEATED,
    TEXT,
    Evaluator,
    interval,
    losses,
    matched_draws,
    trials_of,
)
from tests.support.dense_attention import attend, in_place_of_own, masks, places
from tests.support.tiny_models import VOCAB, build, tokens

ERRORS = ((0.5, 0.1), (0.2, None), (0.4, 0.3))


def small(**changes):
    full = tuple(tuple(True for _ in row) for row in ERRORS)
    given = dict(sink=4, window=16, layers=(0, 1, 2), errors=ERRORS, full=full, weights={"sha256": "x"})
    return KvMap(**{**given, **changes})


@pytest.fixture(scope="module")
def measured():
    model = build("llama")
    with torch.no_grad(), HookManager(model, "all", streaming=(2, 8)) as hooks:
        model(tokens(4, 40))
    return model, hooks.to_profile()


def test_shares_and_bounds():
    half = small().with_share(0.5)
    assert half.streaming == [(0, 1), (1, 0), (2, 1)]
    assert half.kept == [(0, 0), (1, 1), (2, 0)]  # the unknown one too
    assert half.known == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert small().with_share(0).kept == [(1, 1)]
    assert small().with_share(1).streaming == []
    assert small().with_bound(0.3).kept == [(0, 0), (1, 1), (2, 0)]
    assert half.with_bound(0.3).options == {"bound": 0.3}


def test_a_profile_makes_a_map(measured):
    model, profile = measured
    found = kv_map(profile, keep=0.5)
    square = profile.statistics("kv_group_streaming_error_square")["mean"][:, :2]
    assert np.allclose(np.array(found.errors) ** 2, square)
    order = sorted((-square[pair], pair) for pair in np.ndindex(3, 2))
    assert found.ranked() == [pair for _, pair in order]
    assert found.kept == sorted(pair for _, pair in order[:3])
    assert (found.sink, found.window) == (2, 8)
    mean = kv_map(profile, bound=0.2, by="mean")
    assert np.allclose(mean.errors, profile.statistics("kv_group_streaming_error")["mean"][:, :2])
    with streaming(model, found.streaming, sink=found.sink, window=found.window) as context:
        assert context.kv_groups == found.streaming


def test_files(measured, tmp_path):
    model, profile = measured
    found = kv_map(profile, keep=0.5)
    found.save(tmp_path / "map.json")
    assert KvMap.load(tmp_path / "map.json", model) == found
    other = build("llama", seed=1)
    with pytest.raises(KvMapError, match=r"map.json: the map is not of this model's weights"):
        KvMap.load(tmp_path / "map.json", other)
    small(weights=None).save(tmp_path / "none.json")
    with pytest.raises(KvMapError, match="no fingerprint"):
        KvMap.load(tmp_path / "none.json", model)


def read_as_duo_attention_does(folder):
    """As its published loader: `np.loadtxt`, clipped to 0..1, and two numbers of `config.json`."""
    table = np.clip(np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t"), 0, 1)
    config = json.loads((folder / "config.json").read_text())
    return table, config["sink_size"], config["recent_size"]


@pytest.mark.parametrize("keep", [0, 0.25, 0.5, 0.75, 1])
def test_the_format_of_duo_attention(measured, keep, tmp_path):
    _, profile = measured
    found = kv_map(profile, keep=keep)
    found.save_duo(tmp_path / "duo")
    table, sink, recent = read_as_duo_attention_does(tmp_path / "duo")
    assert (sink, recent) == (2, 8)
    assert table.shape == (3, 2)
    full = np.array(found.full)
    assert np.array_equal(table >= 0.5, full)  # by its threshold
    if 0 < keep < 1:
        assert np.array_equal(table >= np.quantile(table, 1 - np.mean(full)), full)  # by its sparsity
    order = np.argsort(-np.array(found.errors).flatten(), kind="stable")
    assert (np.diff(table.flatten()[order]) < 0).all()
    again = DuoPattern.load(tmp_path / "duo")
    assert np.array_equal(again.scores, table)
    assert (again.sink, again.window, again.streaming()) == (2, 8, found.streaming)
    assert KvMap.load(tmp_path / "duo" / "kv_map.json") == found


def test_what_that_format_cannot_say_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="same number of KV groups"):
        small(layers=(0, 1, 5)).save_duo(tmp_path)
    assert small().scores()[1, 1] == 1.0


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(sink=-1), "sink"),
        (dict(window=0), "window"),
        (dict(layers=(0, 1)), "same rows"),
        (dict(layers=(0, 1, 1)), "twice"),
        (dict(errors=((0.5, 0.1), (0.2,), (0.4, 0.3))), "same rows"),
        (dict(errors=((0.5, -0.1), (0.2, None), (0.4, 0.3))), "0 or more"),
        (dict(errors=((0.5, float("nan")), (0.2, None), (0.4, 0.3))), "0 or more"),
        (dict(full=((True, True), (True, False), (True, True))), "must keep the full cache"),
        (dict(full=((True, 1), (True, True), (True, True))), "true and false"),
        (dict(by="max"), "rms or mean"),
        (dict(weights=[1]), "weights"),
        (dict(options=3), "options"),
    ],
)
def test_maps_that_fit_nothing_are_refused(changes, text):
    with pytest.raises(KvMapError, match=text):
        small(**changes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": 1}',
        '{"format": "fastheads kv map", "format_version": 9}',
        "NaN",
        "[" * 9**5,
    ],
)
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(KvMapError, match=r"map.json"):
        KvMap.load(path)


@pytest.mark.parametrize(
    "table, config, text",
    [
        ("a\tb\n", {"sink_size": 1, "recent_size": 2}, "no table of numbers"),
        ("", {"sink_size": 1, "recent_size": 2}, "rows of one length"),
        ("1\t0\n1\n", {"sink_size": 1, "recent_size": 2}, "rows of one length"),
        ("nan\t0\n", {"sink_size": 1, "recent_size": 2}, "rows of one length"),
        ("1\t0\n", {"sink_size": 1}, "no sink_size and recent_size"),
        ("1\t0\n", [], "no sink_size and recent_size"),
    ],
)
def test_other_tables_are_refused(table, config, text, tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text(table)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KvMapError, match=text):
        DuoPattern.load(tmp_path)


def test_profiles_without_errors_are_refused(measured):
    model, profile = measured
    with torch.no_grad(), HookManager(model, "all") as hooks:
        model(tokens(1, 12))
    with pytest.raises(ResultsError, match="no streaming errors: profile with streaming="):
        kv_map(hooks.to_profile(), keep=0.5)
    with torch.no_grad(), HookManager(model, "all", streaming=(2, 8)) as hooks:
        model(tokens(1, 9))
    with pytest.raises(ResultsError, match="longer than sink"):
        kv_map(hooks.to_profile(), keep=0.5)
    for wrong in (
        {},
        {"keep": 0.5, "bound": 1.0},
        {"keep": 1.5},
        {"bound": -1.0},
        {"keep": 0.5, "by": "max"},
    ):
        with pytest.raises(OptionError):
            kv_map(profile, **wrong)


def test_attention_mass():
    model, ids = build("llama"), tokens(2, 40)
    full, near = masks(places(ids.shape), 2, 8)
    want = {}

    def attention(module, query, key, value, mask, scaling, **_):
        z, share = attend(query, key, value, full, scaling)
        beyond = (share * ~near).sum(-1)[:, :, 10:].mean(dim=(0, 2))
        for group, mean in enumerate(beyond.view(2, -1).mean(1).tolist()):
            want[module.layer_idx, group] = mean
        return z.to(value.dtype), None

    with torch.no_grad():
        with in_place_of_own(model, attention):
            model(ids)
        with AttentionMass(model, Window(2, 8)) as mass:
            model(ids)
    assert mass.of_kv_groups() == pytest.approx(want, rel=1e-4)


def test_trials_and_losses():
    model, ids = build("llama"), tokens(3, 60)
    trials = trials_of(ids, 6, VOCAB, sink=2, window=10)
    first, last = trials.ids[:, 8:14], trials.ids[:, -6:]
    assert torch.equal(first, last)
    assert torch.equal(trials.ids[:, 14:54], ids[:, 14:54])
    assert trials.counted[TEXT].nonzero()[:, 1].unique().tolist() == list(range(15, 54))
    assert trials.counted[REPEATED].nonzero()[:, 1].unique().tolist() == list(range(55, 60))
    found = losses(model, trials)
    with torch.no_grad():
        each = -model(trials.ids).logits.log_softmax(-1)[:, :-1].gather(2, trials.ids[:, 1:, None])[..., 0]
    assert found[TEXT] == pytest.approx(each[:, 14:53].mean(1).double().numpy(), rel=1e-5)
    assert found[REPEATED] == pytest.approx(each[:, 54:59].mean(1).double().numpy(), rel=1e-5)
    with pytest.raises(OptionError, match="31 are needed"):
        trials_of(ids[:, :30], 6, VOCAB, sink=2, window=10)
    trials_of(ids[:, :31], 6, VOCAB, sink=2, window=10)


def test_costs_are_against_the_model_as_it_is():
    model, ids = build("llama"), tokens(2, 60)
    evaluator = Evaluator(model, trials_of(ids, 6, VOCAB, sink=2, window=10), sink=2, window=10)
    none = evaluator.cost("none", [])
    assert all((rise == 0).all() for rise in none.rise.values())
    some = evaluator.cost("some", [(0, 1)])
    assert all((rise != 0).all() for rise in some.rise.values())
    assert some.summary()["streaming"] == 1


def test_draws_have_as_many_groups_of_each_layer():
    known = [(layer, group) for layer in range(4) for group in range(3)]
    chosen = [(0, 0), (0, 1), (2, 2)]
    draws = matched_draws(chosen, known, 20)
    assert len({tuple(draw) for draw in draws}) > 3
    for draw in draws:
        assert set(draw) <= set(known)
        assert len(set(draw)) == 3
        assert [sum(layer == n for layer, _ in draw) for n in range(4)] == [2, 0, 1, 0]


def test_intervals_hold_the_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    found = interval(values)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_map_files_name_the_version(tmp_path):
    small().save(tmp_path / "map.json")
    document = json.loads(Path(tmp_path / "map.json").read_text())
    assert document["format"] == "fastheads kv map"
    assert document["version"]
