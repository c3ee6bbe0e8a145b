"""Adapters on projections: each forward by the weight that acted in it, also over quantized weights."""

import copy
import io
import pickle
import warnings

import numpy as np
import peft
import pytest
import torch
from oracle import captured_inputs
from tiny_models import build, tokens
from weight_forms import FORMS, linear, model_with, projections

import fastheads


@pytest.fixture(autouse=True)
def quiet():
    """What the packages warn of on import, on their first use and when they merge; and BitNet's helpers are compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


def lora(model, *names, **options):
    """The model with a LoRA adapter of each name, all of them active."""
    config = peft.LoraConfig(
        r=4, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(0)
    kind = type(projections(model)[0]).__name__  # PEFT asks the model, which from_pretrained would have told
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "Linear4bit", kind == "Linear8bitLt"
    first, *others = names or ("default",)
    model = peft.get_peft_model(model, config, adapter_name=first).eval()
    for name in others:
        model.add_adapter(name, config)
    model.base_model.set_adapter([first, *others])
    return model.eval()


def low_rank(module, name):
    """What the adapter adds to the weight, by LoRA's definition."""
    a, b = (part[name].weight.detach().double().numpy() for part in (module.lora_A, module.lora_B))
    return torch.from_numpy(b @ a * module.scaling[name])


class Steps:
    """Forwards of a model while hooks are on it, and the weights that acted in each."""

    def __init__(self, model, hooks):
        self.model, self.hooks = model, hooks
        self.sites = fastheads.find_sites(model)
        self.norms = [[] for _ in self.sites]

    def forward(self, weights):
        with captured_inputs([s.module for s in self.sites]) as inputs:
            self.model(input_ids=tokens(2, 9, seed=len(self.norms[0])))
        for row, site in enumerate(self.sites):
            x = inputs[row][0].view(-1, site.num_heads, site.head_dim)
            w = weights[row].double().view(64, site.num_heads, site.head_dim)
            self.norms[row].append(torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1))

    def check(self, rtol=1e-5):
        results = self.hooks.get_results()["head_residual_contribution_norm"]
        for row, norms in enumerate(self.norms):
            values = torch.cat(norms)
            np.testing.assert_allclose(results["mean"][row], values.mean(0), rtol=rtol)
            np.testing.assert_allclose(results["max"][row], values.amax(0), rtol=rtol)
            assert (results["count"][row] == len(values)).all()


@pytest.mark.parametrize("backend", ["factored", "einsum"])
def test_several_adapters_some_of_them_merged(backend):
    """As PEFT runs them: with one merged, the others that are active do not act."""
    plain = model_with(linear)
    bases = [p.weight.detach().double().clone() for p in projections(plain)]
    model = lora(plain, "a", "b")
    wrappers = projections(model)
    delta = {name: [low_rank(w, name) for w in wrappers] for name in "ab"}

    def sums(*names):
        return [base + sum(delta[n][row] for n in names) for row, base in enumerate(bases)]

    with torch.no_grad(), fastheads.HookManager(model, "token", backend=backend) as hooks:
        steps = Steps(model, hooks)
        steps.forward(sums("a", "b"))
        model.set_adapter("b")
        steps.forward(sums("b"))
        model.base_model.set_adapter(["a", "b"])
        model.merge_adapter(["a"])
        steps.forward(sums("a"))
        eye = torch.eye(256)
        with hooks.paused():
            said = [w(eye).T.double() for w in wrappers]
        for got, want in zip(said, sums("a"), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        model.merge_adapter(["b"])
        steps.forward(sums("a", "b"))
        with model.disable_adapter():
            steps.forward(bases)
        steps.forward(sums("a", "b"))
        wrappers[1].scaling["a"] *= 3
        delta["a"][1] = delta["a"][1] * 3
        steps.forward(sums("a", "b"))
        wrappers[2].lora_B["b"].weight.mul_(2)
        delta["b"][2] = delta["b"][2] * 2
        steps.forward(sums("a", "b"))
        steps.check()


def test_autocast_does_not_round_the_adapters():
    plain = model_with(linear)
    bases = [p.weight.detach().double().clone() for p in projections(plain)]
    model = lora(plain)
    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks:
        steps = Steps(model, hooks)
        for _ in range(2):
            for site in steps.sites:
                site.module.lora_A["default"].weight.mul_(2)  # so that the factor is made within the forward
            deltas = [low_rank(s.module, "default") for s in steps.sites]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                steps.forward([w + d for w, d in zip(bases, deltas, strict=True)])
        steps.check()


def test_an_adapter_changed_behind_autograds_back_raises():
    model = lora(build())
    with torch.no_grad(), fastheads.HookManager(model) as hooks:
        model(input_ids=tokens(2, 5))
        projections(model)[1].lora_A["default"].weight.data.mul_(2)
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1"):
            hooks.get_results()


OVER = [name for name in FORMS if name not in ("bitnet", "gguf permuted") and not name.startswith("gguf")]


@pytest.mark.parametrize("backend", ["factored", "einsum"])
@pytest.mark.parametrize("name", OVER)
def test_lora_over_a_quantized_weight(name, backend, monkeypatch):
    form = FORMS[name]
    plain = model_with(form.make)
    if getattr(form, "stand_in", None):
        form.stand_in(monkeypatch)
    bases = projections(plain)
    model = lora(plain)

    def base_weights():
        return [torch.from_numpy(form.dense(base)) for base in bases]

    with torch.no_grad(), fastheads.HookManager(model, "token", backend=backend) as hooks:
        steps = Steps(model, hooks)
        assert [s.module.base_layer for s in steps.sites] == bases
        deltas = [low_rank(s.module, "default") for s in steps.sites]
        weights = base_weights()
        steps.forward([w + d for w, d in zip(weights, deltas, strict=True)])
        with model.disable_adapter():
            steps.forward(base_weights())
        steps.forward([w + d for w, d in zip(base_weights(), deltas, strict=True)])
        steps.check()


MERGE = ["bitsandbytes nf4", "bitsandbytes fp4, nested", "bitsandbytes int8", "hqq 4 bits"]


@pytest.mark.parametrize("name", MERGE)
def test_lora_merged_into_a_quantized_weight(name):
    """The sum is quantized anew, and that is the weight; disabled, it would be quantized once more as the layer runs."""
    form = FORMS[name]
    model = lora(model_with(form.make))

    def weights(model):
        return [torch.from_numpy(form.dense(s.module.base_layer)) for s in fastheads.find_sites(model)]

    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks:
        steps = Steps(model, hooks)
        deltas = [low_rank(s.module, "default") for s in steps.sites]
        steps.forward([w + d for w, d in zip(weights(model), deltas, strict=True)])
        model.merge_adapter()
        merged = weights(model)
        steps.forward(merged)
        steps.check()
        with model.disable_adapter():
            with pytest.raises(fastheads.UnsupportedWeightError, match="call unmerge_adapter"):
                model(input_ids=tokens(2, 9))
        model.unmerge_adapter()
        steps.forward([w + d for w, d in zip(weights(model), deltas, strict=True)])
        steps.check()


def test_lora_over_an_offloaded_weight():
    accelerate = pytest.importorskip("accelerate")
    plain = model_with(linear)
    bases = [p.weight.detach().double().clone() for p in projections(plain)]
    model = lora(plain)
    deltas = [low_rank(p, "default") for p in projections(model)]
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.device.type == "meta" for p in projections(model)[0].parameters())
    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks:
        steps = Steps(model, hooks)
        steps.forward([w + d for w, d in zip(bases, deltas, strict=True)])
        with model.disable_adapter():
            steps.forward(bases)
        steps.check()


def adalora(model):
    return peft.AdaLoraConfig(
        target_modules=["o_proj"], task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10
    )


def lora_with(**options):
    return lambda model: peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", **options)


def other(kind, **options):
    return lambda model: getattr(peft, kind)(target_modules=["o_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (adalora, r"SVDLinear of peft\.tuners\.adalora"),
        (lora_with(use_dora=True), r"more than plain LoRA \(DoRA"),
        (lora_with(lora_bias=True), "more than plain LoRA"),
        (other("LoHaConfig"), "only PEFT's plain LoRA"),
        (other("LoKrConfig"), "only PEFT's plain LoRA"),
        (other("IA3Config", feedforward_modules=[]), "only PEFT's plain LoRA"),
        (other("OFTConfig", r=0, oft_block_size=8), "only PEFT's plain LoRA"),
        (other("VeraConfig"), "only PEFT's plain LoRA"),
    ],
)
def test_adapters_that_are_more_than_a_sum_are_refused(config, says):
    model = build(attention_bias=True)
    model = peft.get_peft_model(model, config(model)).eval()
    with pytest.raises(
        fastheads.UnsupportedWeightError, match=rf"layers\.0\.self_attn\.o_proj (is|has) .*{says}"
    ):
        fastheads.HookManager(model)


def test_dora_is_served_while_it_does_not_act():
    plain = model_with(linear)
    bases = [p.weight.detach().double().clone() for p in projections(plain)]
    model = lora(plain, use_dora=True)
    with torch.no_grad(), model.disable_adapter(), fastheads.HookManager(model, "token") as hooks:
        steps = Steps(model, hooks)
        steps.forward(bases)
        steps.check()


# ---------------------------------------------------------------- copies of hooked projections


@pytest.mark.parametrize("make", [linear, FORMS["gemma int8"].make, FORMS["bitsandbytes nf4"].make])
def test_copies_of_a_projection_are_of_its_own_class(make):
    """A copy or a pickle has no part in the class that a projection has while hooks are on it. Some have a hook, which is a
    closure that nobody can pickle, and the error says whose it is.
    """
    model = model_with(make)
    own, x = type(projections(model)[0]), torch.randn(3, 256)
    with fastheads.HookManager(model, layers=[0]):
        hooked, free = projections(model)[:2]
        assert type(hooked) is not own
        if make is linear:
            pickled = pickle.loads(pickle.dumps(hooked))
            assert type(pickled) is own and vars(pickled).keys() == vars(free).keys()
        else:
            with pytest.raises((AttributeError, pickle.PicklingError), match="HookManager"):
                pickle.dumps(hooked)
        assert type(pickle.loads(pickle.dumps(free))) is own
        copied = copy.deepcopy(hooked)
        state = io.BytesIO()
        torch.save(model.state_dict(), state)
    assert type(copied) is own
    module = projections(model)[0]
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is own
    with torch.no_grad():
        for other in (copied, loaded):
            assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_are_merged_and_then_disabled(dtype):
    """The layer takes them off as it runs, and rounds the weight in doing so: that one acts."""
    model = lora(build(dtype=dtype), "a", "b")
    model.merge_adapter()
    sites = fastheads.find_sites(model)
    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks, model.disable_adapter():
        with captured_inputs([s.module for s in sites]) as inputs:
            model(input_ids=tokens(2, 9))
        results = hooks.get_results()["head_residual_contribution_norm"]["mean"]
    for row, site in enumerate(sites):
        assert not site.module.merged
        x = inputs[row][0].view(-1, site.num_heads, site.head_dim)
        w = site.module.base_layer.weight.double().view(64, site.num_heads, site.head_dim)
        norms = torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1)
        np.testing.assert_allclose(results[row], norms.mean(0).detach(), rtol=5e-6)
