"""The factor: exact, also for heads that have no Cholesky factor, and never stale."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens
from torch.nn.utils import parametrizations, prune

import fastheads
from fastheads.backends import factors
from fastheads.backends.factors import lower_factor
from fastheads.models.weights import checksum


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
    monkeypatch.setattr(factors, "CHUNK_ELEMENTS", 96 * 16 * 2)
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
            with hooks.paused():  # the identity goes through the module itself, not through the library
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


def lora(model, **options):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config).eval()


def test_wrapping_a_projection_while_hooks_are_on_it_is_an_error():
    model = build()
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        lora(model)
        with pytest.raises(RuntimeError, match="o_proj of an attention module was replaced or wrapped"):
            model(input_ids=tokens(2, 5))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
def test_adapters_that_are_merged_and_then_disabled(backend):
    plain = build()
    weights = [s.module.weight.detach().clone() for s in fastheads.find_sites(plain)]
    model = lora(plain)
    model.merge_adapter()
    sites = fastheads.find_sites(model)
    with (
        torch.no_grad(),
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", backend=backend) as hooks,
        model.disable_adapter(),
    ):
        model(input_ids=tokens(2, 5))
        assert_results(hooks.get_results(), sites, inputs, [None], "all", 2e-5, weights=weights)


def test_adapters_without_one_weight_are_refused():
    model = lora(build(), lora_dropout=0.5)
    fastheads.HookManager(model).remove()
    with pytest.raises(fastheads.UnsupportedWeightError, match="drops inputs at random"):
        fastheads.HookManager(model.train())
    model.eval()
    with fastheads.HookManager(model), torch.no_grad():
        with pytest.raises(ValueError, match="adapter_names"):
            model(input_ids=tokens(2, 5), adapter_names=["default", "__base__"])
        with pytest.raises(fastheads.UnsupportedWeightError, match="drops inputs at random"):
            model.train()(input_ids=tokens(2, 5))


@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False)])
def test_training_steps(options):
    """A fused optimizer writes weights without moving their version."""
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0, **options)

    def step(model):
        ids = tokens(2, 5, seed=7)
        with torch.enable_grad(), hooks_off(model):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    assert_right(*profile_around(model, step))


@contextmanager
def hooks_off(model):
    """The step's own forward is not among those that are compared."""
    with ExitStack() as stack:
        for manager in managers_on(model):
            stack.enter_context(manager.paused())
        yield


def managers_on(model):
    return [manager for hook in model._forward_pre_hooks.values() for manager in hook.args[0].boundaries]


def test_a_weight_that_changes_during_a_forward_is_an_error():
    model = build()
    o_proj = model.model.layers[1].self_attn.o_proj

    def change(module, _args):
        module.weight.mul_(1.5)

    o_proj.register_forward_pre_hook(change)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1.*during a forward"):
            model(input_ids=tokens(2, 5))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


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


# ---------------------------------------------------------------- weights that are made of other tensors


def pruned(module):
    prune.random_unstructured(module, "weight", 0.5)


def normalized(module):
    parametrizations.weight_norm(module)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (pruned, lambda module: module.weight_orig.mul_(2)),
        (pruned, lambda module: module.weight_mask.copy_(1 - module.weight_mask)),
        (normalized, lambda module: module.parametrizations.weight.original0.mul_(2)),
        (normalized, lambda module: setattr(module.parametrizations.weight, "original0", again(module))),
    ],
)
@pytest.mark.parametrize("backend", ["factored", "einsum"])
def test_a_weight_that_is_made_of_others(make, change, backend):
    model = build()
    for site in fastheads.find_sites(model):
        make(site.module)

    assert_right(*profile_around(model, lambda model: change(o_proj(model)), backend))


def again(module):
    return torch.nn.Parameter(module.parametrizations.weight.original0 * 3)


@pytest.mark.parametrize("shape", [(0,), (64 * 96,), (32, 48)])
def test_a_part_of_a_weight_is_refused(shape):
    """What ZeRO-3, FSDP1 and other ways to share a weight out leave in its place."""
    model = build()
    o_proj(model).weight.data = torch.zeros(shape)
    with pytest.raises(fastheads.UnsupportedWeightError, match=r"layers\.1\..*96\] was expected"):
        fastheads.HookManager(model)
