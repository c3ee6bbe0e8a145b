"""The ablation job: what it scores, which heads it draws, what it refuses, and going on after a stop."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from mean_profiles import RATIO, drawn_profile

import fastheads
from fastheads.corpus.docstrings import docstrings_text
from fastheads.errors import (
    AblationInterrupted,
    CheckpointError,
    DataError,
    ForwardError,
    OptionError,
    ResultsError,
)
from fastheads.intervene.ablation import Ablator
from fastheads.results.ablation import AblationResult
from fastheads.run.ablation import ablation
from fastheads.run.head_sets import head_sets
from fastheads.run.scoring import Scorer

SEEN = {"source": "seen.txt", "sha256": "0" * 64, "head_sha256": "1" * 64, "tokens": 9, "sequences": 1}
TEXTS = ["".join(chr(97 + (n * k) % 26) for k in range(40)) for n in range(1, 60)]
FEW = dict(fractions=(0.25, 0.5), draws=3, sequences=6, seq_len=12, batch_tokens=24)
LOWEST = {0.25: 3, 0.5: 6}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def profile(model):
    return drawn_profile(model, data=SEEN)


def run(model, profile, **options):
    options = {"tokenizer": ascii_tokenizer(), **FEW, **options}
    return ablation(model, profile, options.pop("data", TEXTS), **options)


# ---------------------------------------------------------------- what is scored


def by_hand(model, ids, heads, means=None):
    """Loss by sequence and log-probabilities of the model, with the heads' inputs replaced by hooks of this test; float64."""
    handles = []
    for layer, module in enumerate(m.self_attn.o_proj for m in model.model.layers):

        def hook(_module, args, layer=layer):
            x = args[0].clone().view(*args[0].shape[:-1], 4, 8)
            for at, head in heads:
                if at == layer:
                    x[..., head, :] = 0.0 if means is None else torch.from_numpy(means[layer, head]).float()
            return (x.flatten(-2),)

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    for handle in handles:
        handle.remove()
    log_p = logits.log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0].mean(-1), log_p


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("batch_tokens", [12, 24, 1000])
def test_the_effects_are_those_of_dense_algebra(model, profile, mode, batch_tokens):
    """One row in a forward, some, and all sequences with several sets."""
    ids = torch.randint(1, 130, (5, 12), generator=torch.Generator().manual_seed(0))
    sets = [[(0, 1)], [(1, 0), (2, 3), (0, 0)], [], [(2, 2)]]
    means = profile.vectors.mean if mode == "mean" else None
    base, log_p = by_hand(model, ids, [])
    found = [[] for _ in sets]
    with Scorer(
        model, ids, Ablator(model, mode, profile if means is not None else None), batch_tokens=batch_tokens
    ) as scorer:
        assert scorer.group == (1 if batch_tokens < 1000 else 16)
        losses = []
        for chunk in scorer.chunks:
            intact = scorer.intact(chunk)
            losses += intact.losses
            for n, effects in enumerate(scorer.effects(intact, sets)):
                found[n] += effects
    np.testing.assert_allclose(losses, base, rtol=0, atol=1e-6)
    for heads, effects in zip(sets, found, strict=True):
        loss, log_q = by_hand(model, ids, heads, means)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
        np.testing.assert_allclose([rise for rise, _ in effects], loss - base, rtol=0, atol=2e-6)
        np.testing.assert_allclose([kl for _, kl in effects], kl, rtol=0, atol=2e-6)


def test_the_result_holds_every_set_where_it_belongs(model, profile):
    result = run(model, profile, each_head=True, metrics=[RATIO, "head_residual_contribution_norm"])
    assert (result.complete, result.sequences, result.mode) == (True, 6, "zero")
    assert [curve.metric for curve in result.curves] == [RATIO, "head_residual_contribution_norm"]
    ids = torch.tensor(
        [
            [ord(c) + 1 for c in "".join(TEXTS)[n * 12 : n * 12 + 12]] for n in range(6)
        ]  # no EOS between documents
    )
    base, _ = by_hand(model, ids, [])
    np.testing.assert_allclose(result.base, base, atol=1e-6)

    def check(heads, rise):
        np.testing.assert_allclose(rise, by_hand(model, ids, heads)[0] - base, rtol=0, atol=2e-6)

    for curve in result.curves:
        for n, fraction in enumerate(FEW["fractions"]):
            assert set(curve.heads[n]) == set(profile.ranked_cells(curve.metric)[: LOWEST[fraction]])
            check(curve.heads[n], curve.rise[n])
    for draws in (result.random, *result.matched):
        for n in range(2):
            for draw in range(3):
                assert len(set(draws.heads[n][draw])) == LOWEST[FEW["fractions"][n]]
                check(draws.heads[n][draw], draws.rise[n, draw])
    for curve, matched in zip(result.curves, result.matched, strict=True):
        assert matched.metric == curve.metric
        for n in range(2):
            want = sorted(layer for layer, _ in curve.heads[n])
            assert all(sorted(layer for layer, _ in draw) == want for draw in matched.heads[n])
    assert result.each_head.heads == [(layer, head) for layer in range(3) for head in range(4)]
    for heads, rise in zip(result.each_head.heads, result.each_head.rise, strict=True):
        check([heads], rise)
    assert AblationResult.from_json(result.to_json()).to_json() == result.to_json()


def test_mean_mode_ranks_by_the_mean_ablation_error(model, profile):
    result = run(model, profile, mode="mean")
    assert [curve.metric for curve in result.curves] == ["mean_ablation_error_ratio"]
    assert set(result.curves[0].heads[0]) == set(profile.rank(mode="mean", model=model, n=3))
    ids = torch.tensor([[ord(c) + 1 for c in "".join(TEXTS)[n * 12 : n * 12 + 12]] for n in range(6)])
    base, _ = by_hand(model, ids, [])
    rise = by_hand(model, ids, result.curves[0].heads[0], profile.vectors.mean)[0] - base
    np.testing.assert_allclose(result.curves[0].rise[0], rise, atol=2e-6)
    other = run(model, profile, mode="mean", metrics=[RATIO], draws=0)
    assert [curve.metric for curve in other.curves] == [RATIO]
    assert (other.random, other.matched) == (None, [])


def test_mean_mode_where_the_error_is_unknown_ranks_by_the_ratio(model, profile):
    unknown = drawn_profile(model, data=SEEN)
    unknown.vectors.power[1, 2] = 0.0  # less than the constant part alone has
    with pytest.warns(
        RuntimeWarning, match="ranking by head_residual_ratio: .* is unknown for 1 of 12 heads"
    ):
        result = run(model, unknown, mode="mean")
    assert [curve.metric for curve in result.curves] == [RATIO]
    with pytest.raises(ResultsError, match="unknown for 1 of 12 heads"):
        run(model, unknown, mode="mean", metrics=["mean_ablation_error_ratio"])


def test_draws_are_the_same_by_seed_and_need_not_be_matched(model, profile):
    one, two = (run(model, profile, seed=seed, matched=False) for seed in (0, 0))
    assert one.random.heads == two.random.heads
    assert one.matched == []
    assert run(model, profile, seed=1).random.heads != one.random.heads


def test_draws_are_even():
    """Each head is drawn as often as any other."""
    ranked = [(layer, head) for layer in range(4) for head in range(5)]
    found = head_sets({"m": ranked}, [0.25], draws=4_000, seed=0)
    counts = np.zeros((4, 5))
    for index in found.random[0]:
        for pair in found.sets[index]:
            counts[pair] += 1
    expected, deviation = 1_000, math.sqrt(4_000 * 0.25 * 0.75)
    assert abs(counts - expected).max() < 4.5 * deviation
    assert {tuple(sorted(layer for layer, _ in found.sets[i])) for i in found.matched["m"][0]} == {
        (0, 0, 0, 0, 0)
    }


def test_equal_sets_are_scored_once(model, profile):
    counted = []
    run(model, profile, fractions=[1.0], draws=5, progress=lambda done, total: counted.append(total))
    assert counted[-1] == 6  # sequences of the one set of all heads


def test_evaluations_leave_the_model_as_it_was(model, profile):
    model.train()
    try:
        run(model, profile)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
    finally:
        model.eval()


# ---------------------------------------------------------------- data


def test_the_default_text_is_another_than_that_of_profile(model):
    source = docstrings_text()
    assert source.size > 100_000
    assert fastheads.corpus.open_source(None).sha256 != source.sha256
    profile = fastheads.profile(model, tokenizer=ascii_tokenizer(), seq_len=16, max_tokens=64)
    result = run(model, profile, data=None)
    assert result.about["data"]["source"].startswith("docstrings of Python")
    assert result.about["data"]["seen"] is False


def test_seen_data_are_refused_unless_allowed(model, tmp_path):
    file, again = tmp_path / "text.txt", tmp_path / "again.txt"
    file.write_text("\n".join(TEXTS))
    again.write_text("\n".join(TEXTS))
    profile = fastheads.profile(model, str(file), tokenizer=ascii_tokenizer(), seq_len=16)
    with pytest.raises(DataError, match=r"has seen this data.*allow_seen=True"):
        run(model, profile, data=str(again))
    assert run(model, profile, data=str(again), allow_seen=True).about["data"]["seen"] is True
    again.write_text("\n".join(reversed(TEXTS)))
    assert run(model, profile, data=str(again)).about["data"]["seen"] is False


def test_a_merged_profile_has_seen_the_data_of_all_its_parts(model, tmp_path):
    parts = []
    for n in range(2):
        (tmp_path / f"{n}.txt").write_text("\n".join(TEXTS[n * 20 : n * 20 + 20]))
        parts.append(
            fastheads.profile(model, str(tmp_path / f"{n}.txt"), tokenizer=ascii_tokenizer(), seq_len=16)
        )
    merged = fastheads.HeadProfile.merge(parts)
    for n in range(2):
        with pytest.raises(DataError, match="has seen this data"):
            run(model, merged, data=str(tmp_path / f"{n}.txt"))


def test_unknown_data_may_have_been_seen(model):
    with pytest.raises(DataError, match="does not say which data"):
        run(model, drawn_profile(model))
    ids = torch.randint(1, 130, (2, 12))
    profile = fastheads.profile(model, ids)
    with pytest.raises(DataError, match="'token batches' has no hash"):
        run(model, profile)
    assert run(model, profile, allow_seen=True).sequences == 6


def test_too_little_data_is_refused(model, profile):
    with pytest.raises(DataError, match=r"has 5 whole sequences of 12 tokens, not 6"):
        run(model, profile, data=["x" * 71])
    with pytest.raises(OptionError, match="not on token batches"):
        run(model, profile, data=torch.ones(2, 3, dtype=torch.long))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fractions": [0.0]}, "fractions must be above 0 and up to 1, not 0.0"),
        ({"fractions": [1.1]}, "fractions must be above 0"),
        ({"fractions": [math.nan]}, "fractions must be above 0"),
        ({"fractions": []}, "at least one"),
        ({"fractions": [0.5, 0.25]}, "fractions must increase"),
        ({"fractions": [0.01]}, "the fraction 0.01 of 12 heads is no head"),
        ({"draws": -1}, "random draws must be 0 to 10000, not -1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"sequences": 0}, "sequences must be at least 1, not 0"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"metrics": ["size"]}, "no metric 'size' in this profile"),
        ({"metrics": ["kv_group_residual_contribution_norm"]}, "ranks KV heads"),
        ({"mode": "max"}, "unknown mode 'max'"),
    ],
)
def test_bad_options(model, profile, options, says):
    with pytest.raises(OptionError, match=says) as raised:
        run(model, profile, **options)
    assert "\n" not in str(raised.value)


def test_profiles_that_do_not_fit(model, profile):
    with pytest.raises(ResultsError, match="not of these weights"):
        run(tiny_llama(seed=1), profile)
    with pytest.raises(ResultsError, match="no mean vectors"):
        run(model, drawn_profile(model, vectors=False, data=SEEN), mode="mean", metrics=[RATIO])
    without = drawn_profile(model, data=SEEN)
    del without.moments[RATIO]
    with pytest.raises(ResultsError, match="no head_residual_ratio"):
        run(model, without)
    with pytest.raises(OptionError, match="not measured for the same heads"):
        head_sets({"one": [(0, 0), (0, 1)], "two": [(0, 0)]}, [0.5], draws=0, seed=0)


def test_a_loss_that_is_nan_is_refused(profile):
    model = tiny_llama()
    broken = drawn_profile(model, data=SEEN)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    broken.metadata["weights"] = None
    with pytest.raises(ForwardError, match="NaN or infinite.*float32"):
        run(model, broken)


# ---------------------------------------------------------------- stopping and going on


class Stop:
    """A progress function that interrupts the process after some reports."""

    def __init__(self, after, number=signal.SIGINT):
        self.left, self.number, self.seen = after, number, []

    def __call__(self, done, total):
        self.seen.append((done, total))
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [3, 20, 27])
def test_interrupted_and_continued_it_is_the_same(model, profile, tmp_path, after, number):
    want = run(model, profile, each_head=True)
    files = dict(output=tmp_path / "r.json", checkpoint=tmp_path / "r.json.checkpoint")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop(after, number)
    with pytest.raises(AblationInterrupted) as stopped:
        run(model, profile, each_head=True, progress=stop, **files)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (stopped.value.number, stopped.value.checkpoint) == (number, files["checkpoint"])
    sets = stop.seen[0][1] // 6
    chunks = after // (sets + 1) if after > sets else 0
    if chunks == 0:
        assert stopped.value.result is None
        assert not files["output"].exists()
    else:  # two sequences a chunk
        kept = AblationResult.load(files["output"])
        assert (kept.complete, kept.sequences) == (False, 2 * chunks)
        np.testing.assert_array_equal(kept.curves[0].rise, want.curves[0].rise[:, : kept.sequences])
        assert kept.to_json() == stopped.value.result.to_json()
    said = []
    go_on = Stop(0)
    result = run(model, profile, each_head=True, progress=go_on, say=said.append, **files)
    assert go_on.seen[0] == stop.seen[-1]
    assert said == [
        f"continuing from {files['checkpoint']}: {stop.seen[-1][0]} of {sets * 6} evaluations are done"
    ]
    assert result.to_json() == want.to_json() == files["output"].read_text().strip()
    assert not files["checkpoint"].exists()


def test_it_is_written_as_it_goes(model, profile, tmp_path):
    seen = []

    def look(done, total):
        path = tmp_path / "r.json"
        seen.append(AblationResult.load(path).sequences if path.exists() else 0)

    run(model, profile, progress=look, output=tmp_path / "r.json")
    assert sorted(set(seen)) == [0, 2, 4]
    assert AblationResult.load(tmp_path / "r.json").sequences == 6


@pytest.fixture
def stopped_at(model, profile, tmp_path):
    """A checkpoint of an interrupted run."""
    path = tmp_path / "r.checkpoint"
    with pytest.raises(AblationInterrupted):
        run(model, profile, progress=Stop(16), checkpoint=path)
    assert path.exists()
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "mean", "metrics": [RATIO]}, 'mode is not what it was: "zero" then and "mean" now'),
        ({"seed": 1}, "seed is not what it was: 0 then and 1 now"),
        ({"fractions": [0.25]}, "fractions is not what it was"),
        ({"data": TEXTS[1:]}, "data sha256 is not what it was"),
        ({"sequences": 8}, "data sequences is not what it was: 6 then and 8 now"),
        ({"batch_tokens": 12}, "sequences of a chunk is not what it was: 2 then and 1 now"),
        ({"metrics": ["head_residual_contribution_norm"]}, "metrics is not what it was"),
    ],
)
def test_only_the_same_run_continues(model, profile, stopped_at, changes, says):
    with pytest.raises(CheckpointError, match=says) as raised:
        run(model, profile, checkpoint=stopped_at, **changes)
    assert "Delete the file" in str(raised.value)
    assert stopped_at.exists()


def test_other_weights_do_not_continue(stopped_at):
    other = tiny_llama(seed=1)
    with pytest.raises(CheckpointError, match="model weights is not what it was"):
        run(other, drawn_profile(other, data=SEEN), checkpoint=stopped_at)


def damaged(document):
    yield "not JSON", b"{"
    yield "a list", b"[]"
    yield "NaN", json.dumps({**document, "base": [float("nan")]}).encode()
    yield "another format", json.dumps({**document, "format": "x"}).encode()
    yield "no configuration", json.dumps({**document, "configuration": []}).encode()
    yield "no scores", json.dumps({**document, "scores": None}).encode()
    first, *others = document["scores"]
    yield "a set too few", json.dumps({**document, "scores": others}).encode()
    yield "a set twice", json.dumps({**document, "scores": [first, first, *others]}).encode()
    for n, wrong in enumerate(
        ([99, [], []], [first[0], first[1][:-1], first[2][:-1]], [first[0], first[1], []], [0], ["0", [], []])
    ):
        yield f"scores {n}", json.dumps({**document, "scores": [wrong, *others]}).encode()
    yield "more than the base", json.dumps({**document, "base": []}).encode()
    yield "half a chunk", json.dumps({**document, "base": document["base"][:1]}).encode()
    yield "deep", b'{"a":' * 100_000


def test_damaged_checkpoints_are_refused(model, profile, stopped_at):
    document = json.loads(stopped_at.read_text())
    for name, content in damaged(document):
        stopped_at.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            run(model, profile, checkpoint=stopped_at)
            raise AssertionError(name)
        assert stopped_at.read_bytes() == content


def test_a_full_disk_warns_and_the_run_goes_on(model, profile, tmp_path, monkeypatch):
    from fastheads.run import ablation as module

    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(module, "write_atomic", full)
    monkeypatch.setattr(module, "EVERY", 0.0)
    said = []
    assert run(model, profile, checkpoint=tmp_path / "c", say=said.append).complete
    assert said == [
        f"warning: cannot write the checkpoint {tmp_path / 'c'}: No space left on device; the run continues"
    ]
