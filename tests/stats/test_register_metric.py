"""Metrics of another package: measured, saved, loaded, merged and shown, against the float64 oracle."""

import subprocess
import sys

import pytest
import torch
from oracle import captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads import HeadProfile, HookManager, register_metric
from fastheads.errors import BackendError, OptionError, ResultsError

MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
IDS = [tokens(2, 6, seed=i) for i in range(3)]
PACKED = torch.tensor([0, 4, 6, 12], dtype=torch.int32)


def largest(z, _weight):
    """The largest element of each head's output, in absolute value."""
    return z.abs().amax(dim=-1)


def drift(z, weight):
    """The sum of what the head adds: positive or negative."""
    return torch.einsum("bshd,ohd->bsh", z.double(), weight.double())


register_metric("test_largest_norm", largest)
register_metric("test_drift", drift, needs_weight=True)


def values(name, x, site):
    """Float64 `[batch, seq, heads]`, head by head."""
    weight = site.module.weight.detach().double()
    out = []
    for h in range(site.num_heads):
        part = slice(h * site.head_dim, (h + 1) * site.head_dim)
        z = x.double()[..., part]
        if name == "test_largest_norm":
            out.append(z.abs().max(-1).values)
        else:
            contribution = z @ weight[:, part].T
            power = contribution.pow(2).sum(-1)
            out.append(contribution.sum(-1) if name == "test_drift" else power)
    return torch.stack(out, -1)


def samples(name, x, site, sequences, token_agg):
    """One list of samples `[n, heads]` of one call; `sequences`: (row, positions of its valid tokens)."""
    found = values(name, x, site)
    out = []
    for row, positions in sequences:
        here = found[row, positions]
        if token_agg == "token":
            out += list(here)
        else:
            out.append(here[-1] if token_agg == "last" else here.mean(0))
    return out


def check(results, model, calls, sequences, name, token_agg):
    sites = fastheads.find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        for call in calls:
            model(**call)
    for row, site in enumerate(sites):
        every = torch.stack([s for x in inputs[row] for s in samples(name, x, site, sequences, token_agg)])
        got = {stat: tensor[row, : site.num_heads] for stat, tensor in results[name].items()}
        assert (got["count"] == len(every)).all()
        for stat, want in {
            "mean": every.mean(0),
            "var": every.var(0),
            "min": every.amin(0),
            "max": every.amax(0),
        }.items():
            torch.testing.assert_close(got[stat], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("name", ["test_largest_norm", "test_drift", "head_residual_contribution_power"])
@pytest.mark.parametrize("how", ["mask", "packed", "compiled", "large"])
def test_a_metric_from_outside_is_measured_like_those_of_the_library(name, token_agg, how):
    torch._dynamo.reset()
    model = build()
    calls = [dict(input_ids=ids, attention_mask=MASK) for ids in IDS]
    sequences = [(row, MASK[row].nonzero().flatten()) for row in range(2)]
    if how == "packed":
        calls = [
            dict(
                input_ids=ids.view(1, 12),
                cu_seq_lens_q=PACKED,
                position_ids=torch.tensor([[*range(4), *range(2), *range(6)]]),
            )
            for ids in IDS
        ]
        sequences = [(0, torch.arange(a, b)) for a, b in [(0, 4), (4, 6), (6, 12)]]
    called = torch.compile(model, backend="eager") if how == "compiled" else model
    options = {"group_bytes": 0} if how == "large" else {}
    with HookManager(model, token_agg, metrics=["head_output_norm", name], **options) as hooks:
        with torch.no_grad():
            for call in calls:
                called(**call)
        results = hooks.get_results()
    torch._dynamo.reset()
    assert set(results) == {"head_output_norm", name, "metadata"}
    check(results, model, calls, sequences, name, token_agg)


def profile_of(ids, metrics=("head_residual_contribution_norm", "test_drift")):
    model = build()
    with HookManager(model, "all", metrics=metrics) as hooks, torch.no_grad():
        model(input_ids=ids)
        return hooks.to_profile()


def test_profiles_hold_it_also_where_nobody_registered_it(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for ids, path in zip(IDS, paths, strict=False):
        profile_of(ids).save(path)
    loaded = HeadProfile.load(paths[0])
    assert loaded.metrics == ("head_residual_contribution_norm", "test_drift")
    torch.testing.assert_close(
        loaded.moments["test_drift"].mean, profile_of(IDS[0]).moments["test_drift"].mean
    )
    assert sorted(loaded.rank("test_drift")) == sorted(loaded.ranked_cells("head_residual_contribution_norm"))
    cli = [sys.executable, "-m", "fastheads"]
    merged = tmp_path / "merged.safetensors"
    for command in (["merge", *paths, "-o", merged], ["show", merged, "--metric", "test_drift"]):
        done = subprocess.run([*cli, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "test_drift" in done.stdout
    count = HeadProfile.load(merged).moments["test_drift"].count
    assert (count == 4).all()


def test_profile_measures_it():
    got = fastheads.profile(
        build(), [{"input_ids": ids} for ids in IDS], metrics=["test_drift", "head_output_norm"]
    )
    assert set(got.metrics) == {"test_drift", "head_output_norm"}
    assert (got.moments["test_drift"].count == 6).all()


def test_what_is_wrong_with_a_metric_is_said():
    with pytest.raises(OptionError, match="unknown metric 'nobody'"):
        HookManager(build(), metrics=["nobody"])
    with pytest.raises(OptionError, match="metrics is empty"):
        HookManager(build(), metrics=[])
    with pytest.raises(OptionError, match="there already"):
        register_metric("head_output_norm", largest)
    with pytest.raises(OptionError, match="there already"):
        register_metric("test_drift", largest)
    with pytest.raises(OptionError, match="identifier"):
        register_metric("a metric", largest)
    register_metric("test_drift", drift, needs_weight=True)  # once more, the same
    register_metric("test_shape", lambda z, _: z.sum(-1).sum(-1))
    with HookManager(build(), metrics=["test_shape"]) as hooks, torch.no_grad():
        with pytest.raises(BackendError, match=r"must give values \[2, 6, 4\]"):
            hooks.model(input_ids=IDS[0])
        assert not hooks.to_profile().moments["test_shape"].count.any()
    register_metric("test_negative_norm", lambda z, _: -z.abs().sum(-1))
    with HookManager(build(), metrics=["test_negative_norm"]) as hooks, torch.no_grad():
        hooks.model(input_ids=IDS[0])
        with pytest.raises(ResultsError, match="negative values"):
            hooks.get_results()
