"""bench/science.py on a tiny model: its losses against dense algebra, its statistics against numbers known beforehand."""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from tiny_models import build, tokens

from fastheads import find_sites

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The modules `science`, `ablated` and `science_report`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import ablated
        import science
        import science_report

        yield argparse.Namespace(ablated=ablated, science=science, report=science_report)


def log_probabilities(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.double(), -1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("skip", [0, 3])
def test_losses_equal_a_model_with_the_columns_zeroed(bench, family, skip, monkeypatch):
    monkeypatch.setattr(bench.ablated, "LOGITS", 2 * 12 * 101)  # two sequences in a forward
    model, ids, heads = build(family), tokens(5, 12), [(1, 0), (2, 3)]
    losses = bench.ablated.AblatedLosses(model, ids, skip=skip, kl=True)
    means = bench.ablated.mean_outputs(model, ids.split(2))
    before = log_probabilities(model, ids)
    for replacement in (None, means):
        changed = copy.deepcopy(model)
        for row, head in heads:
            site = find_sites(changed)[row]
            part = slice(head * site.head_dim, (head + 1) * site.head_dim)
            if replacement is not None:
                bias = site.module.weight.detach()[:, part].double() @ means[row, head]
                before_bias = 0 if site.module.bias is None else site.module.bias.detach()
                site.module.bias = torch.nn.Parameter((bias + before_bias).float())
            site.module.weight.data[:, part] = 0
        after = log_probabilities(changed, ids)
        ce = [
            -after[:, skip:-1].gather(-1, ids[:, skip + 1 :, None]).squeeze(-1).mean(1),
            ((before - after) * before.exp()).sum(-1)[:, skip:-1].mean(1),
        ]
        found = losses.measure(heads, means=replacement, kl=True)
        np.testing.assert_allclose(np.array(found), torch.stack(ce).numpy(), atol=2e-6)
        np.testing.assert_allclose(losses.measure(heads, means=replacement)[0], ce[0].numpy(), atol=2e-6)
    intact = -before[:, skip:-1].gather(-1, ids[:, skip + 1 :, None]).squeeze(-1).mean(1)
    np.testing.assert_allclose(losses.intact, intact.numpy(), atol=2e-6)
    assert torch.equal(log_probabilities(model, ids), before)
    assert all("forward" not in vars(layer) for layer in losses.layers)


def test_ranks_and_correlations(bench):
    science = bench.science
    assert science.ranked(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.0, 0.5, 3.0, 1.5]
    a, b = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 5.0])
    assert science.pearson(science.ranked(a), science.ranked(b)) == pytest.approx(0.8)
    assert science.pearson(a, -(a**2)) < -0.9
    assert np.isnan(science.pearson(a, np.ones(5)))


def test_a_score_that_is_the_truth_correlates_with_it(bench):
    rng = np.random.default_rng(0)
    cells = [(row, head) for row in range(6) for head in range(5)]
    effect = rng.lognormal(size=30)
    truth = effect[:, None] * rng.lognormal(sigma=0.1, size=(30, 8))
    scores = {
        bench.science.RATIO_METRIC: effect.reshape(6, 5),
        "reversed": -effect.reshape(6, 5),
        "noise": rng.random((6, 5)),
    }
    found = bench.science.correlations(scores, {"zero_kl": truth}, cells, rng)
    best, worst, noise = (found[name]["zero_kl"] for name in scores)
    assert best["low"] > 0.95 and worst["high"] < -0.95
    assert noise["low"] < 0 < noise["high"] < 0.8
    assert worst["less_than_ratio_low"] > 1.9 and noise["less_than_ratio_low"] > 0.3
    assert best["within_layers"] > 0.9
    assert bench.science.reliability(truth) > 0.95


def test_draws_within_layers(bench):
    rng = np.random.default_rng(0)
    cells = [(row, head) for row in range(4) for head in range(5)]
    heads = [(0, 1), (2, 0), (2, 3), (2, 4)]
    drawn = [bench.science.same_layers(heads, cells, rng) for _ in range(50)]
    for cells_drawn in drawn:
        assert sorted(row for row, _ in cells_drawn) == [0, 2, 2, 2]
        assert len(set(cells_drawn)) == 4
    assert {head for of in drawn for row, head in of if row == 0} == set(range(5))


@pytest.mark.parametrize("needs", [True, False])
def test_sequences_begin_with_bos_if_the_model_needs_it(bench, needs):
    """Whether or not the tokenizer adds it: the model predicts the next token well only with, or only without it."""
    tokenizer = ascii_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "\x01"})

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids, **_):
            has = bool((input_ids[:, 0] == tokenizer.bos_token_id).all())
            right = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 130).float()
            return argparse.Namespace(logits=right * (9.0 if has == needs else 1.0))

    windows = bench.science.Windows(Model(), tokenizer, "What a text this is. " * 99)
    assert windows.bos == (tokenizer.bos_token_id if needs else None)
    rows = windows.of("Another one. " * 99, 0.5, 1.0, 3, 10)
    assert rows.shape == (3, 10) and (rows[:, 0] == tokenizer.bos_token_id).all() == needs


def test_the_whole_on_a_tiny_model(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.science, "RESAMPLES", 20)
    monkeypatch.setattr(bench.science, "CODE", ("this", "textwrap"))
    monkeypatch.setattr(bench.science, "FRACTIONS", (0.25, 0.5))
    options = argparse.Namespace(
        heads=7, sequences=5, single_sequences=4, seq_len=16, scored=8, draws=3, seed=0
    )
    report = bench.science.run(tiny_llama(positions=256), ascii_tokenizer(), options, 0.0) | {"model": "tiny"}
    report = json.loads(json.dumps(bench.report.rounded(report)))
    assert (report["layers"], report["heads"], len(report["single_heads"])) == (3, 4 * 3, 7)
    for score in (
        "head_residual_ratio",
        "head_residual_ratio_rms",
        "weight_norm",
        "late_layers_first",
        "random",
    ):
        assert np.shape(report["scores"][score]) == (3, 4)
        for truth in bench.report.TRUTHS:
            assert -1 <= report["correlations"][score][truth]["rho"] <= 1
    for text in ("english", "code"):
        for point, number in zip(report["curves"][text]["points"], (3, 6), strict=True):
            assert point["heads"] == number
            assert (
                point["scores"]["head_residual_ratio"]["low"]
                <= point["scores"]["head_residual_ratio"]["high"]
            )
            for name in ("random", "same_layers"):
                assert len(point[name]["draws"]) == len(point[name]["more_than_ratio"]) == 3
    assert "Spearman with 7 single heads" in bench.report.table(report)
    bench.report.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
