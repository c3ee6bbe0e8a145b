"""The factor: exact, also for heads that have no Cholesky factor, and never stale."""

import numpy as np
import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.factors import lower_factor
from fastheads.weights import checksum


def norms_by_factor(weight, num_heads, z):
    return (z @ lower_factor(weight, num_heads)).norm(dim=-1)  # [H, N]


def dense(weight, num_heads, z):
    w = weight.double().view(weight.shape[0], num_heads, -1)
    return torch.einsum("ohd,hnd->hno", w, z).norm(dim=-1)


def weight_of(kind, out_features=96, num_heads=3, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(out_features, num_heads, head_dim, generator=generator, dtype=torch.float64)
    if kind == "pruned columns":
        w[:, 1, 4:] = 0
    elif kind == "zero head":
        w[:, 1] = 0
    elif kind == "rank deficient":
        w[:, 1] = w[:, 1, :3] @ torch.randn(3, head_dim, generator=generator, dtype=torch.float64)
    elif kind == "decaying":  # condition number 1e4
        u, _, v = torch.linalg.svd(w[:, 1], full_matrices=False)
        w[:, 1] = u * torch.logspace(0, -4, head_dim, dtype=torch.float64) @ v
    elif kind == "narrow":  # fewer rows than head_dim: no head has full rank
        w = w[: head_dim // 2]
    return w.reshape(w.shape[0], -1)


@pytest.mark.parametrize(
    "kind", ["random", "pruned columns", "zero head", "rank deficient", "decaying", "narrow"]
)
def test_factor_gives_the_dense_norms(kind):
    weight = weight_of(kind)
    lower = lower_factor(weight, 3)
    assert torch.equal(lower, lower.tril())
    z = torch.randn(3, 200, 16, dtype=torch.float64)
    want = dense(weight, 3, z)
    torch.testing.assert_close(norms_by_factor(weight, 3, z), want, rtol=1e-10, atol=1e-12)


def test_weak_directions_of_an_ill_conditioned_head():
    weight = weight_of("decaying")
    w = weight.view(96, 3, 16)[:, 1]
    weak = torch.linalg.svd(w)[2][-4:]  # [4, D]
    z = torch.zeros(3, 4, 16, dtype=torch.float64)
    z[1] = weak
    torch.testing.assert_close(norms_by_factor(weight, 3, z)[1], dense(weight, 3, z)[1], rtol=1e-6, atol=0)


def test_a_weight_that_is_not_finite_gives_nan_and_no_crash():
    weight = weight_of("random")
    weight[3, 20] = torch.nan
    lower = lower_factor(weight, 3)
    assert lower[1].isnan().any() and lower[0].isfinite().all() and lower[2].isfinite().all()


def test_the_factor_is_built_some_heads_at_a_time(monkeypatch):
    weight = weight_of("rank deficient")
    whole = lower_factor(weight, 3)
    monkeypatch.setattr("fastheads.factors.CHUNK_ELEMENTS", 96 * 16 * 2)
    torch.testing.assert_close(lower_factor(weight, 3), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_checksum_sees_every_bit_and_every_exchange(dtype):
    weight = torch.randn(8, 12).to(dtype)
    before = checksum(weight)
    assert checksum(weight.clone()) == before
    for change in (
        lambda w: w[3, 4].neg_(),
        lambda w: w[0, 0].mul_(1.1),
        lambda w: w.copy_(w.roll(1, 0)),
        lambda w: w.copy_(w.roll(1, 1)),
        lambda w: w.index_copy_(0, torch.tensor([0, 1]), w[[1, 0]].clone()),
        lambda w: w.view(-1)[:2].copy_(w.view(-1)[:2].flip(0).clone()),
        lambda w: w.mul_(2),
    ):
        other = weight.clone()
        change(other)
        assert checksum(other) != before


# ---------------------------------------------------------------- staleness


def profile_around(model, change, backend="factored"):
    """Forwards before and after `change`; the results, and what they must be with the weights of each forward."""
    sites = fastheads.find_sites(model)
    inputs, weights = [], []
    with fastheads.HookManager(model, "token", backend=backend) as hooks, torch.no_grad():
        for step in range(2):
            if step:
                change(model)
            with captured_inputs([s.module for s in sites]) as captured:
                model(input_ids=tokens(2, 5, seed=step))
            inputs.append([c[0] for c in captured])
            weights.append([s.module.weight.detach().double().clone() for s in sites])
        return hooks.get_results(), sites, inputs, weights


def assert_right(results, sites, inputs, weights):
    for row, site in enumerate(sites):
        values = []
        for step in range(2):
            x = inputs[step][row].view(-1, site.num_heads, site.head_dim)
            w = weights[step][row].view(-1, site.num_heads, site.head_dim)
            values.append(torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1))
        values = torch.cat(values)
        got = results["head_residual_contribution_norm"]
        np.testing.assert_allclose(got["mean"][row], values.mean(0), rtol=5e-6)
        np.testing.assert_allclose(got["std"][row], values.std(0), rtol=1e-4)
        np.testing.assert_allclose(got["max"][row], values.amax(0), rtol=5e-6)


def o_proj(model):
    return model.model.layers[1].self_attn.o_proj


def replaced(model):
    o_proj(model).weight = torch.nn.Parameter(torch.randn_like(o_proj(model).weight))


ORDINARY = {
    "mul_": lambda model: o_proj(model).weight.mul_(3),
    "load_state_dict": lambda model: model.load_state_dict(build(seed=5).state_dict()),
    "a new parameter": replaced,
    "weight.data assigned": lambda model: setattr(
        o_proj(model).weight, "data", o_proj(model).weight.data * 3
    ),
    "to another dtype and back": lambda model: model.bfloat16().float(),
    "nothing": lambda model: None,
}
BEHIND = {
    "data.mul_": lambda model: o_proj(model).weight.data.mul_(3),
    "through numpy": lambda model: np.multiply(
        o_proj(model).weight.numpy(), 3, out=o_proj(model).weight.numpy()
    ),
    "one element": lambda model: o_proj(model).weight.data[5, 7].neg_(),
}


@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
@pytest.mark.parametrize("change", ORDINARY)
def test_an_ordinary_change_gives_the_right_number(change, backend):
    assert_right(*profile_around(build(), ORDINARY[change], backend))


@pytest.mark.parametrize("change", BEHIND)
def test_a_change_behind_autograds_back_raises(change):
    with pytest.raises(fastheads.StaleFactorError, match=r"model\.layers\.1\.self_attn\.o_proj.*reset"):
        profile_around(build(), BEHIND[change])
    for backend in ("einsum", "loop"):  # these read the weight each time
        assert_right(*profile_around(build(), BEHIND[change], backend))


def test_reset_takes_the_weights_as_they_are():
    model = build()
    sites = fastheads.find_sites(model)
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(input_ids=tokens(2, 5))
        o_proj(model).weight.data.mul_(3)
        with pytest.raises(fastheads.StaleFactorError):
            hooks.get_results()
        with pytest.raises(fastheads.StaleFactorError):
            hooks.get_results()  # still
        hooks.reset()
        with captured_inputs([s.module for s in sites]) as inputs:
            model(input_ids=tokens(2, 5))
        assert_results(hooks.get_results(), sites, inputs, [None], "all", 5e-6)


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
def test_adapters(backend, targets):
    """LoRA beside the weight, merged while attached, unmerged, disabled: each forward by the weight that acted in it."""
    import peft

    model = build()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    sites = fastheads.find_sites(model)
    eye = torch.eye(96)
    contributions = []

    def forward(seed):
        with captured_inputs([s.module for s in sites]) as captured:
            model(input_ids=tokens(2, 5, seed=seed))
        for row, s in enumerate(sites):
            handles = hooks._handles  # the identity goes through the module itself, not through the library
            assert handles
            with hooks.paused():
                w = s.module(eye).double().T.view(64, 4, 24)
            x = captured[row][0].view(-1, 4, 24)
            if len(contributions) <= row:
                contributions.append([])
            contributions[row].append(torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1))

    with torch.no_grad(), fastheads.HookManager(model, "token", backend=backend) as hooks:
        forward(0)
        model.merge_adapter()
        forward(1)
        model.unmerge_adapter()
        forward(2)
        with model.disable_adapter():
            forward(3)
        forward(4)
        results = hooks.get_results()["head_residual_contribution_norm"]
    for row, values in enumerate(contributions):
        values = torch.cat(values)
        np.testing.assert_allclose(results["mean"][row], values.mean(0), rtol=5e-6)
        np.testing.assert_allclose(results["max"][row], values.amax(0), rtol=5e-6)
        assert (results["count"][row] == 50).all()


def test_what_is_not_plainly_dense_is_refused_by_name():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = build()
    model.model.layers[1].self_attn.o_proj = Scaled(96, 64, bias=False)
    with pytest.raises(fastheads.UnsupportedWeightError, match=r"layers\.1\.self_attn\.o_proj is a Scaled"):
        fastheads.HookManager(model)
    model = build()
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 96, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(fastheads.UnsupportedWeightError, match="int8"):
        fastheads.HookManager(model)


def test_dora_is_refused():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["o_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(fastheads.UnsupportedWeightError, match="LoRA"):
        fastheads.HookManager(peft.get_peft_model(build(), config))
