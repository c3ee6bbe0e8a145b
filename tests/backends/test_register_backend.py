"""A backend of another package: registered by name, used by name, refused where it says so or returns what cannot be norms."""

import subprocess
import sys

import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads import HeadProfile, HookManager, register_backend

MASK = [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 1, 1, 1, 1]]
RTOL = 5e-6


class Outside:
    """What each of the backends here begins with."""

    def unsupported(self, device, dtype, head_dim):
        return None


@register_backend
class Einsum(Outside):
    name = "outside-einsum"

    def contribution_norms(self, x, weights):
        groups, _, heads, head_dim = weights.shape
        z = x.double().view(groups, -1, heads, head_dim)
        return torch.einsum("gnhd,gohd->gnho", z, weights.double()).norm(dim=-1)


class Factor(Outside):
    name = "outside.factor"
    needs = "factor"

    def contribution_norms(self, x, weights):
        groups, heads, head_dim, _ = weights.shape
        self.groups = groups
        z = x.view(groups, -1, heads, head_dim)
        return torch.einsum("gnhd,ghde->gnhe", z, weights).norm(dim=-1)


factor = register_backend(Factor())


def run(backend, token_agg="all", masks=(MASK, None), **options):
    """Results and profile of a forward for each mask, and what the oracle needs."""
    model = build()
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([site.module for site in sites]) as inputs,
        HookManager(model, token_agg, backend=backend, **options) as hooks,
        torch.no_grad(),
    ):
        for i, mask in enumerate(masks):
            attention_mask = None if mask is None else torch.tensor(mask)
            model(input_ids=tokens(3, 7, seed=i), attention_mask=attention_mask)
        return hooks.get_results(), hooks.to_profile(), sites, inputs


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["outside-einsum", "outside.factor"])
def test_it_is_as_right_as_the_others(backend, token_agg):
    masks = (MASK, None)
    results, profile, sites, inputs = run(backend, token_agg, masks)
    assert_results(results, sites, inputs, masks, token_agg, RTOL)
    assert profile.metadata["backend"] == results["metadata"]["backend"] == backend


def test_a_factor_comes_for_all_layers_of_one_shape_at_once():
    run("outside.factor")
    assert factor.groups == 3


def test_its_profiles_are_saved_loaded_merged_and_shown(tmp_path):
    whole, _, _, _ = run("outside-einsum")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, mask in zip(paths, (MASK, None), strict=True):
        model = build()
        with HookManager(model, "all", backend="outside-einsum") as hooks, torch.no_grad():
            attention_mask = None if mask is None else torch.tensor(mask)
            model(input_ids=tokens(3, 7, seed=paths.index(path)), attention_mask=attention_mask)
            hooks.to_profile().save(path)
    merged = HeadProfile.merge([HeadProfile.load(path) for path in paths])
    for metric, statistics in merged.results().items():
        if metric != "metadata":
            torch.testing.assert_close(statistics["mean"], whole[metric]["mean"], rtol=1e-12, atol=0)
            assert torch.equal(statistics["count"], whole[metric]["count"])
    merged.save(tmp_path / "merged.safetensors")
    assert HeadProfile.load(tmp_path / "merged.safetensors").metadata["backend"] == "outside-einsum"
    shown = subprocess.run(
        [sys.executable, "-m", "fastheads", "show", tmp_path / "merged.safetensors"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "6 sequences a head" in shown.stdout


def test_kv_groups_are_measured_with_it():
    results, _, _, _ = run("outside-einsum", kv_groups=True)
    want, _, _, _ = run("loop", kv_groups=True)
    metric = "kv_group_residual_contribution_norm"
    torch.testing.assert_close(
        results[metric]["mean"], want[metric]["mean"], rtol=RTOL, atol=0, equal_nan=True
    )


def test_a_weight_that_changes_is_followed():
    model = build()
    with HookManager(model, backend="outside.factor") as hooks, torch.no_grad():
        model(input_ids=tokens(3, 7), use_cache=False)
        before = hooks.get_results()["head_residual_contribution_norm"]["mean"][2]
        hooks.reset()
        model.model.layers[2].self_attn.o_proj.weight.mul_(3)
        model(input_ids=tokens(3, 7), use_cache=False)
        after = hooks.get_results()["head_residual_contribution_norm"]["mean"][2]
    torch.testing.assert_close(after, 3 * before, rtol=1e-5, atol=0)


def test_auto_never_picks_it():
    results, _, _, _ = run("auto")
    assert results["metadata"]["backend"] == "factored"


def test_unknown_names_are_told_the_choices():
    with pytest.raises(
        ValueError, match=r"unknown backend 'outside-einsam': choose one of auto, loop.*outside-einsum"
    ):
        HookManager(build(), backend="outside-einsam")


def test_the_same_object_may_be_registered_again_and_another_may_not():
    assert register_backend(Einsum) is Einsum
    assert register_backend(factor) is factor
    for taken in ("outside.factor", "triton", "loop", "auto"):
        other = Factor()
        other.name = taken
        with pytest.raises(fastheads.errors.OptionError, match=f"'{taken}' is taken"):
            register_backend(other)


def made(**parts):
    return type("Made", (Outside,), {"contribution_norms": lambda self, x, weights: None} | parts)()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (object(), "name must be"),
        (made(name=""), "name must be"),
        (made(name="a+b"), "name must be"),
        (made(name=3), "name must be"),
        (made(name="outside-needs", needs="form"), "needs must be 'weight' or 'factor'"),
        (made(name="outside-silent", contribution_norms=None), "method 'contribution_norms'"),
        (made(name="outside-all", unsupported=None), "method 'unsupported'"),
    ],
)
def test_what_is_no_backend_is_refused_at_once(wrong, said):
    with pytest.raises(fastheads.errors.OptionError, match=said):
        register_backend(wrong)


def test_it_is_refused_for_what_it_does_not_serve():
    def unsupported(self, device, dtype, head_dim):
        return f"dtype {dtype}" if dtype != torch.bfloat16 else None

    register_backend(made(name="outside-half", unsupported=unsupported))
    with pytest.raises(
        fastheads.errors.BackendError, match=r"'outside-half' cannot be used: dtype torch\.float32"
    ):
        HookManager(build(), backend="outside-half")
    register_backend(made(name="outside-gone", missing=lambda self: "libgone is not installed"))
    with pytest.raises(
        fastheads.errors.BackendError, match="'outside-gone' cannot be used: libgone"
    ) as error:
        HookManager(build(), backend="outside-gone")
    assert "loop, einsum, factored" in str(error.value)


RETURNS = {
    "nothing": lambda norms: None,
    "broadcast": lambda norms: norms[..., :1],
    "transposed": lambda norms: norms.mT,
    "flat": lambda norms: norms[0],
    "whole": lambda norms: norms.long(),
}


@pytest.mark.parametrize("how", RETURNS)
def test_a_return_value_that_cannot_be_norms_is_an_error_and_the_forward_does_not_count(how):
    def contribution_norms(self, x, weights):
        return RETURNS[how](Einsum().contribution_norms(x, weights))

    register_backend(made(name=f"outside-{how}", contribution_norms=contribution_norms))
    model = build()
    with HookManager(model, backend=f"outside-{how}") as hooks, torch.no_grad():
        with pytest.raises(
            fastheads.errors.BackendError, match=r"must return floating-point norms \[1, 2, 4\]"
        ):
            model(input_ids=tokens(2, 6))
        with pytest.warns(RuntimeWarning, match="nothing was measured"):
            results = hooks.get_results()
        assert not results["head_output_norm"]["count"].any()


def test_parameters_of_its_own_keep_no_graph():
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def contribution_norms(self, x, weights):
        return Einsum().contribution_norms(x, weights) * scale

    register_backend(made(name="outside-trained", contribution_norms=contribution_norms))
    model = build()
    with HookManager(model, backend="outside-trained") as hooks:
        model(input_ids=tokens(2, 6))
        assert not hooks.get_results()["head_residual_contribution_norm"]["mean"].requires_grad
