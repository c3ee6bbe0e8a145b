"""Managers that are forgotten, copied or saved, and models that cannot be profiled as they are."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from tiny_models import build, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.capture import forward_hooks
from fastheads.capture.manager import recorder_of
from fastheads.errors import ForwardError, NoSitesError, NotCopyableError, OptionError, UnsupportedWeightError


def one_forward(model):
    with torch.no_grad():
        return model(tokens(2, 6)).logits


def hooks_left(model):
    """The hooks of the modules, and of torch's optimizers."""
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return on_modules, len(optimizer._global_optimizer_post_hooks)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_manager_that_is_forgotten_leaves_the_model_and_is_freed(family):
    model = build(family)
    before = hooks_left(model)
    manager = fastheads.HookManager(model)
    for _ in range(4):  # some of whose inputs wait to be measured
        one_forward(model)
    recorder = weakref.ref(recorder_of(manager))
    del manager
    gc.collect()
    assert recorder() is None
    assert hooks_left(model) == before
    assert {type(site.module) for site in fastheads.find_sites(model)} == {torch.nn.Linear}
    one_forward(model)


def test_a_model_that_is_forgotten_with_its_manager_is_freed():
    model = build("gemma2")
    model.manager = fastheads.HookManager(model)  # a cycle
    one_forward(model)
    gone = [weakref.ref(model), weakref.ref(recorder_of(model.manager))]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert len(forward_hooks._shared) == 0


def test_a_manager_that_is_forgotten_takes_no_other_ones_hooks():
    model = build()
    with fastheads.HookManager(model) as kept:
        fastheads.HookManager(model)
        gc.collect()
        one_forward(model)
        assert (kept.get_results()["head_output_norm"]["count"] == 2).all()


def test_many_managers_leave_nothing():
    model = build(num_hidden_layers=1)
    one_forward(model)
    before, counts = hooks_left(model), []
    for number in range(120):
        manager = fastheads.HookManager(model)
        one_forward(model)
        if number % 2:
            manager.remove()
        del manager
        if number in (20, 119):
            gc.collect()
            counts.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))
    assert hooks_left(model) == before
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_manager_is_neither_copied_nor_pickled(act):
    model = build()
    with fastheads.HookManager(model) as hooks:
        with pytest.raises(NotCopyableError, match="to_profile"):
            act(hooks)
        one_forward(model)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_model_with_hooks_on_is_not_pickled(save):
    model = build()
    with fastheads.HookManager(model):
        with pytest.raises(NotCopyableError, match="remove"):
            save(model)
    save(model)


def sparse(layout):
    def change(weight):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that these are in beta
            return torch.nn.Parameter(getattr(weight.detach(), f"to_{layout}")(), requires_grad=False)

    return change


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr"])
def test_a_sparse_weight_is_refused_before_and_after_the_hooks_are_on(layout):
    model = build()
    module = model.model.layers[1].self_attn.o_proj
    module.weight = sparse(layout)(module.weight)
    with pytest.raises(UnsupportedWeightError, match=r"layers\.1.*layout torch\.sparse.*to_dense"):
        fastheads.HookManager(model)
    module.weight = torch.nn.Parameter(module.weight.to_dense())
    with fastheads.HookManager(model):
        module.weight = sparse(layout)(module.weight)
        with pytest.raises(UnsupportedWeightError, match="layout"):
            one_forward(model)


def test_a_forward_of_fake_tensors_is_refused_by_name():
    model = build()
    with fastheads.HookManager(model):
        for _ in range(3):
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
                with pytest.raises(ForwardError, match="FakeTensor"):
                    model(torch.ones(2, 5, dtype=torch.long))


def test_attention_that_cannot_be_profiled_is_refused_only_in_the_layers_asked_for():
    model = build()
    attention = model.model.layers[2].self_attn
    attention.projection_of_its_own = attention.o_proj
    expected = fastheads.HookManager(model, layers=[0, 1])
    with expected:
        one_forward(model)
    del attention.o_proj
    attention.o_proj = torch.nn.Identity()
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(NoSitesError, match=r"layers\.2"):
        fastheads.HookManager(model)
    with pytest.raises(NoSitesError, match=r"layers\.2"):
        fastheads.HookManager(model, layers=[1, 2])
    with fastheads.HookManager(model, layers=[0, 1]) as hooks:
        one_forward(model)
        found = hooks.get_results()["head_output_norm"]
        assert torch.equal(found["mean"], expected.get_results()["head_output_norm"]["mean"][:2])
    with pytest.raises(OptionError, match="layers 0 to 1"):
        fastheads.HookManager(model, layers=[0, 5])


def wrapper(package, name, bases=(torch.nn.Module,)):
    base = type(name, bases, {"__module__": f"{package}.some.module"})
    return type("Special", (base,), {"__module__": "mine"})


@pytest.mark.parametrize("manager", [fastheads.HookManager, BasicHookManager, fastheads.find_sites])
def test_wrappers_of_other_packages_are_refused_with_the_model_that_can_be_profiled(manager):
    for package, name, bases in (
        ("nnsight", "Envoy", (object,)),
        ("transformer_lens", "TransformerBridge", (torch.nn.Module,)),
        ("transformer_lens", "HookedRootModule", (torch.nn.Module,)),
    ):
        with pytest.raises(NoSitesError, match=r"Special cannot be profiled: .*from_pretrained"):
            manager(wrapper(package, name, bases)())


def test_a_projection_whose_forward_nnsight_replaced_is_refused_with_the_reason():
    model = build()

    def call(self, *args):
        raise AssertionError

    controller = type("Controller", (), {"__module__": "nnsight.intervention.source", "__call__": call})
    model.model.layers[0].self_attn.o_proj.forward = controller()
    with pytest.raises(UnsupportedWeightError, match="nnsight put it there"):
        fastheads.HookManager(model)


@pytest.mark.parametrize("manager", [fastheads.HookManager, BasicHookManager, fastheads.find_sites])
@pytest.mark.parametrize("model", ["my-llama", None, 3])
def test_what_is_no_module_is_refused_with_how_to_load_one(manager, model):
    with pytest.raises(OptionError, match=r"torch\.nn\.Module, not .*from_pretrained"):
        manager(model)


def test_a_decoder_whose_forward_is_called_directly_is_refused_with_what_to_call():
    model = build()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = model.model

        def forward(self, ids):
            return self.enc.forward(ids)

    wrapper = Wrapper()
    with fastheads.HookManager(wrapper), torch.no_grad():
        with pytest.raises(
            ForwardError, match=r"LlamaModel\.forward\(\) was called directly.*LlamaModel\(\.\.\.\)"
        ):
            wrapper(tokens(2, 6))
    with fastheads.HookManager(wrapper.enc) as hooks, torch.no_grad():
        wrapper(tokens(2, 6))
        with pytest.warns(RuntimeWarning, match=r"model\.forward\(\) runs no hooks"):
            hooks.get_results()
        wrapper.enc(tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
