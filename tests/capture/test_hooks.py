"""Attaching, detaching, and the life of one forward."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from oracle import METRICS, RATIO_METRICS, UPDATE_METRIC, assert_results, captured_inputs, equal_results
from tiny_models import build, tokens

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.capture import forward_hooks
from fastheads.capture.manager import recorder_of
from fastheads.errors import ResultsError

MANAGERS = [fastheads.HookManager, BasicHookManager]
managers = pytest.mark.parametrize("manager", MANAGERS, ids=["fast", "basic"])


def everything_on(model):
    """All that a manager could leave behind: the attributes and hooks of every module."""
    return {
        name: {k: (dict(v) if isinstance(v, dict) else v) for k, v in vars(m).items() if "hook" in k}
        | {"class": type(m), "keys": sorted(vars(m))}
        for name, m in model.named_modules()
    }


def one_forward(model, seed=0, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens(2, 6, seed=seed), **kwargs).logits


@managers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_identical(manager, dtype):
    model = build(dtype=dtype)
    plain = one_forward(model)
    for token_agg in ("last", "all", "token"):
        with manager(model, token_agg):
            assert torch.equal(one_forward(model), plain)
    assert torch.equal(one_forward(model), plain)


@managers
def test_nothing_is_left_after_remove(manager):
    model = build()
    before = everything_on(model)
    hooks = manager(model)
    assert everything_on(model) != before
    one_forward(model)
    hooks.remove()
    hooks.remove()
    assert everything_on(model) == before
    count = hooks.get_results()["head_output_norm"]["count"].clone()
    one_forward(model)
    assert torch.equal(hooks.get_results()["head_output_norm"]["count"], count)
    with manager(model):
        one_forward(model)
    assert everything_on(model) == before


@managers
def test_an_exception_in_the_block_removes_everything(manager):
    model = build()
    before = everything_on(model)
    with pytest.raises(ZeroDivisionError), manager(model):
        one_forward(model)
        raise ZeroDivisionError
    assert everything_on(model) == before


def test_a_constructor_that_fails_leaves_nothing():
    model = build()
    model.model.layers[2].self_attn.o_proj.weight = torch.nn.Parameter(torch.empty(64, 96, device="meta"))
    before = everything_on(model)
    with pytest.raises(fastheads.UnsupportedWeightError, match=r"layers\.2\.self_attn\.o_proj.*meta"):
        fastheads.HookManager(model)
    assert everything_on(model) == before


def test_two_managers_do_not_disturb_each_other():
    model = build()
    with fastheads.HookManager(model, "all") as alone:
        one_forward(model)
        one_forward(model, seed=1)
        want = alone.get_results()
    with fastheads.HookManager(model, "all") as first:
        one_forward(model)
        with fastheads.HookManager(model, "last") as second, BasicHookManager(model, "all") as third:
            one_forward(model, seed=1)
            assert (second.get_results()["head_output_norm"]["count"] == 2).all()
            assert (third.get_results()["head_output_norm"]["count"] == 2).all()
        assert equal_results(first.get_results(), want)


@managers
def test_paused_counts_nothing(manager):
    model = build()
    with manager(model) as hooks:
        with hooks.paused():
            one_forward(model)
            with hooks.paused():
                one_forward(model)
            one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()
        one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


@managers
def test_results_of_nothing_come_with_a_word(manager):
    model = build()
    with manager(model) as hooks:
        with pytest.warns(
            RuntimeWarning, match="^nothing was measured: no forward of the model has ended"
        ) as told:
            hooks.get_results()
        assert told[0].filename == __file__
        one_forward(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hooks.get_results()


@managers
def test_reset_forgets(manager):
    model = build()
    with manager(model) as hooks:
        one_forward(model)
        want = hooks.get_results()
        one_forward(model, seed=1)
        hooks.reset()
        stats = hooks.get_results()["head_output_norm"]
        assert (stats["count"] == 0).all() and stats["mean"].isnan().all() and stats["max"].isnan().all()
        one_forward(model)
        assert equal_results(hooks.get_results(), want)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model.layers.1.self_attn.o_proj", "model.layers.2.mlp", "lm_head"])
def test_a_forward_counts_once_or_not_at_all(where, error):
    model = build()
    with fastheads.HookManager(model, "all") as hooks:
        one_forward(model)
        want_one = hooks.get_results()
        one_forward(model, seed=1)
        want_two = hooks.get_results()
    failing = model.get_submodule(where)

    def fail(_module, _args):
        raise error

    with fastheads.HookManager(model, "all") as hooks:
        one_forward(model)
        handle = failing.register_forward_pre_hook(fail)
        with pytest.raises(error):
            one_forward(model, seed=2)
        handle.remove()
        assert equal_results(hooks.get_results(), want_one)
        one_forward(model, seed=1)
        assert equal_results(hooks.get_results(), want_two)


@managers
def test_the_decoder_called_directly_counts(manager):
    model = build()
    with manager(model, "all") as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        through_model = hooks.get_results()
        hooks.reset()
        model.model(tokens(2, 6), torch.ones(2, 6, dtype=torch.long))  # the mask by position
        assert equal_results(hooks.get_results(), through_model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_decoder_called_directly_counts_after_a_forward_that_failed(error):
    model = build()

    def fail(*_):
        raise error

    with fastheads.HookManager(model) as hooks, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(input_ids=tokens(2, 6))
        handle.remove()
        model.model(tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "lm_head"])
def test_a_paused_forward_after_ctrl_c_counts_nothing(where):
    model = build()

    def interrupt(*_):
        raise KeyboardInterrupt

    with fastheads.HookManager(model) as hooks:
        handle = model.get_submodule(where).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            one_forward(model)
        handle.remove()
        with hooks.paused():
            one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()
        one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


def test_a_decoder_called_again_after_its_error_was_caught_is_refused():
    model = build()
    decoder_forward = model.model.forward

    def forward(input_ids):
        try:
            return model.model(input_ids=torch.cat([input_ids, input_ids]), fail=True)
        except ZeroDivisionError:
            return model.model(input_ids=input_ids)

    def fail_late(*args, fail=False, **kwargs):
        output = decoder_forward(*args, **kwargs)
        return 1 / 0 if fail else output

    model.model.forward, model.forward = fail_late, forward
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        with pytest.raises(RuntimeError, match="did not end"):
            model(tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


def test_a_copy_of_a_model_with_hooks_is_a_model_without():
    model = build()
    with fastheads.HookManager(model) as hooks:
        one_forward(model)
        twin = copy.deepcopy(model)
        assert {type(s.module) for s in fastheads.find_sites(twin)} == {torch.nn.Linear}
        assert torch.equal(one_forward(twin), one_forward(model))
        with fastheads.HookManager(twin) as own:
            one_forward(twin)
            assert (own.get_results()["head_output_norm"]["count"] == 2).all()
        del twin
        gc.collect()
        one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 6).all()


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_an_error_of_pickle_says_whose_hook_it_cannot_pickle(family):
    if family == "gemma2":  # has a hook behind its projection
        model = build(family)
    else:  # its projection is no torch.nn.Linear
        sizes = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=101, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with fastheads.HookManager(model) as hooks:
        with pytest.raises((AttributeError, pickle.PicklingError), match="HookManager"):
            pickle.dumps(hooks.sites[0].module)


def test_a_forward_after_an_interrupted_remove_does_not_vanish_from_the_results(monkeypatch):
    model = build()
    hooks = fastheads.HookManager(model)
    one_forward(model)

    def interrupt(_self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            forward_hooks._Handle, "remove", interrupt
        )  # after the taps, before the hooks of the call
        with pytest.raises(KeyboardInterrupt):
            hooks.remove()
    one_forward(model)
    with pytest.raises(ResultsError, match="did not run in every forward"):
        hooks.get_results()
    hooks.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("ask", ["get_results", "to_profile"])
def test_the_warning_of_nonfinite_samples_names_the_line_of_the_caller(ask):
    model = build()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    with fastheads.HookManager(model) as hooks:
        one_forward(model)
        with pytest.warns(RuntimeWarning, match="NaN or infinite") as warned:
            getattr(hooks, ask)()
    assert [warning.filename for warning in warned] == [__file__]


def test_a_removed_manager_is_freed_and_its_model_too():
    model = build("gemma2")
    hooks = fastheads.HookManager(model, "all")
    one_forward(model)
    hooks.remove()
    gone = [weakref.ref(each) for each in (hooks, recorder_of(hooks))]
    del hooks
    gc.collect()
    assert [each() for each in gone] == [None, None]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_it_has_every_public_attribute_of_the_basic_manager():
    model = build()
    with BasicHookManager(model, "all") as basic, fastheads.HookManager(model, "all") as hooks:
        public = [name for name in {*vars(basic), *vars(BasicHookManager)} if not name.startswith("_")]
        assert "get_results" in public
        assert [name for name in public if not hasattr(hooks, name)] == []
        assert (hooks.model, hooks.token_agg) == (basic.model, basic.token_agg)
        assert [site.name for site in hooks.sites] == [site.name for site in basic.sites]


def test_a_projection_shared_by_two_layers_is_one_site():
    model = build()
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    sites = fastheads.find_sites(model)
    assert [s.layer for s in sites] == [0, 2]
    for group_bytes in (0, 1 << 20):
        with (
            captured_inputs([s.module for s in sites]) as inputs,
            fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks,
        ):
            one_forward(model)
            flat = [[torch.cat(x)] for x in inputs]
            assert_results(hooks.get_results(), sites, flat, [None], "all", 5e-6)


def test_a_projection_that_gets_a_parametrization_keeps_it():
    from torch.nn.utils import parametrize

    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = build()
    o_proj = model.model.layers[0].self_attn.o_proj
    with fastheads.HookManager(model):
        parametrize.register_parametrization(o_proj, "weight", Double())
    assert o_proj.weight.shape == (64, 96)
    one_forward(model)


@managers
def test_a_layer_called_alone_does_not_count(manager):
    model = build()
    with manager(model) as hooks, torch.no_grad():
        model.model.layers[0].self_attn.o_proj(torch.randn(1, 3, 96))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


@managers
def test_gradients_are_bit_identical_and_checkpointing_does_not_count_twice(manager):
    ids = tokens(2, 6)

    def gradients(model):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = build().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    plain = gradients(model)
    with manager(model) as hooks:
        hooked = gradients(model)
        results = hooks.get_results()
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    assert (results["head_output_norm"]["count"] == 2).all()


def test_a_module_that_fires_twice_gives_two_samples():
    model = build()
    model.model.layers.append(model.model.layers[0])  # a looped layer
    model.config.num_hidden_layers = 4
    with fastheads.HookManager(model, "all") as hooks:
        one_forward(model)
        count = hooks.get_results()["head_output_norm"]["count"]
    assert count[:, 0].tolist() == [4, 2, 2]


def test_inference_mode_and_ordinary_mode_mix():
    model = build()
    with torch.inference_mode():
        hooks = fastheads.HookManager(model, "all")
        model(input_ids=tokens(2, 6))
    one_forward(model, seed=1)
    model(input_ids=tokens(2, 6, seed=2))
    results = hooks.get_results()
    hooks.reset()
    with torch.inference_mode():
        model(input_ids=tokens(2, 6))
    hooks.remove()
    assert (results["head_output_norm"]["count"] == 6).all()


@pytest.mark.parametrize("backend", ["loop", "einsum", "factored"])
def test_ambient_settings_change_no_number(backend):
    model = build()
    sites = fastheads.find_sites(model)
    ids = tokens(2, 6)
    with captured_inputs([s.module for s in sites]) as inputs:
        one_forward(model)

    def feed(hooks):
        """The same inputs to the hooks, whatever the settings make of the model's own products."""
        handles = [
            s.module.register_forward_pre_hook(lambda _m, _a, x=x: (x[0].float(),), prepend=True)
            for s, x in zip(sites, inputs, strict=True)
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return hooks.get_results()

    with fastheads.HookManager(model, "all", backend=backend) as hooks:
        want = feed(hooks)
    assert_results(want, sites, inputs, [None], "all", 5e-6)
    precision = torch.get_float32_matmul_precision()
    mkldnn, cuda = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("medium", "high"):
            torch.set_float32_matmul_precision(setting)
            with fastheads.HookManager(model, "all", backend=backend) as hooks:
                assert equal_results(feed(hooks), want)
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = mkldnn, cuda
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        fastheads.HookManager(model, "all", backend=backend) as hooks,
    ):
        assert equal_results(feed(hooks), want)
    try:
        torch.set_default_dtype(torch.float16)
        with fastheads.HookManager(model, "all", backend=backend) as hooks:
            got = hooks.get_results()
            assert equal_results(feed(hooks), want)
            assert got["head_output_norm"]["sem"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        torch.set_default_device("meta")
        hooks = fastheads.HookManager(model, "all", backend=backend)
    finally:
        torch.set_default_device(None)
    try:
        torch.set_default_device("meta")
        got = feed(hooks)
        hooks.remove()
    finally:
        torch.set_default_device(None)
    assert equal_results(got, want)


def test_float32_products_are_taken_in_float32():
    """What holds on a CPU whose bfloat16 units would serve "medium", and on a GPU with TF32."""
    from fastheads.stats.numerics import exact_arithmetic

    for device, matmul in (("cpu", torch.backends.mkldnn.matmul), ("cuda", torch.backends.cuda.matmul)):
        before = matmul.fp32_precision
        with exact_arithmetic(device):
            assert matmul.fp32_precision == "ieee"
            assert not torch.is_autocast_enabled(device) and not torch.is_grad_enabled()
        assert matmul.fp32_precision == before


# ---------------------------------------------------------------- the seed's integration


MAIN = """
import torch
{imports}

def main(model, loader, token_agg):
    hook_manager = HookManager(model, token_agg=token_agg)
    for input_ids, attention_mask in loader:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask)
    results = hook_manager.get_results()
    hook_manager.remove()
    return results
"""


@pytest.mark.parametrize("token_agg", ["last", "all"])
def test_the_seeds_main_runs_unchanged_with_either_import(token_agg):
    loader = [
        (tokens(3, 5, seed=i), torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])) for i in range(3)
    ]
    results = []
    for imports in ("from fastheads import HookManager", "from fastheads.basic import HookManager"):
        namespace = {}
        exec(MAIN.format(imports=imports), namespace)
        results.append(namespace["main"](build(), loader, token_agg))
    fast, basic = results
    assert fast.keys() == basic.keys() == {*METRICS, UPDATE_METRIC, *RATIO_METRICS, "metadata"}
    for metric in (*METRICS, UPDATE_METRIC, *RATIO_METRICS):
        assert fast[metric].keys() == basic[metric].keys()
        for stat, value in basic[metric].items():
            assert fast[metric][stat].dtype == value.dtype and fast[metric][stat].shape == (3, 4)
            torch.testing.assert_close(fast[metric][stat], value, rtol=2e-5, atol=1e-9)
    assert fast["metadata"].keys() == basic["metadata"].keys()
    assert fast["metadata"]["sites"] == basic["metadata"]["sites"]


def test_both_managers_have_the_same_public_names():
    """A script that swaps one import for the other runs unchanged."""
    fast, basic = (manager(build()) for manager in (fastheads.HookManager, BasicHookManager))
    with fast, basic, torch.no_grad():
        one_forward(fast.model)
        one_forward(basic.model)
        names = [{name for name in dir(hooks) if not name.startswith("_")} for hooks in (fast, basic)]
        assert names[0] == names[1]
        assert fast.token_agg == basic.token_agg == "last"
        assert fast.stats.launches >= 1 and basic.stats.launches == len(basic.sites)
        assert fast.findings == basic.findings == {}
        assert repr(fast) == (
            "<HookManager of LlamaForCausalLM: 3 of 3 sites, token_agg='last', backend='auto', attached>"
        )
    assert repr(fast).endswith("removed>")
