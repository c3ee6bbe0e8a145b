"""Weights that a module computes each time: read without a trace, and refused where no one weight acts."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastheads
from fastheads import StaleFactorError, UnsupportedWeightError
from fastheads.basic import HookManager as BasicHookManager

BACKENDS = ["auto", "einsum", "loop"]
IDS = tokens(2, 6)


def projections(model):
    return [site.module for site in fastheads.find_sites(model)]


def with_weights(make, **options):
    """A small model whose projections' weights are made by `make(projection)`."""
    torch.manual_seed(0)
    model = build(num_hidden_layers=2, **options)
    for projection in projections(model):
        make(projection)
    return model


def by(parametrization, **options):
    return lambda module: parametrize.register_parametrization(module, "weight", parametrization(), **options)


def spectral(module):
    parametrizations.spectral_norm(module)


def weight_norm(module):
    parametrizations.weight_norm(module)


class Scaled(nn.Module):
    """A function of its buffers and its attributes."""

    def __init__(self):
        super().__init__()
        self.scale, self.rows = 2.0, nn.Buffer(torch.linspace(1, 2, 64)[:, None])

    def forward(self, weight):
        return weight * self.scale * self.rows


class Dropped(nn.Module):
    """Other elements each time; `draw` gives what they are chosen by."""

    def __init__(self, draw=torch.rand_like, always=True):
        super().__init__()
        self.draw, self.always = draw, always

    def forward(self, weight):
        return weight * (self.draw(weight) > 0.5) if self.training or self.always else weight


class Generated(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, weight):
        return weight * torch.rand(weight.shape, generator=self.generator)


class Counting(nn.Module):
    """A counter in a buffer, and no other weight for it."""

    def __init__(self):
        super().__init__()
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.int64))

    def forward(self, weight):
        self.calls += 1
        return weight * 1.0


class CountingBehind(Counting):
    def forward(self, weight):
        self.calls.data.add_(1)
        return weight * 1.0


class Averaging(nn.Module):
    """A buffer that is replaced each time."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(()))

    def forward(self, weight):
        self.mean = 0.5 * self.mean + weight.abs().mean().detach()
        return weight / self.mean


class Stepping(nn.Module):
    """Plain attributes: a number, a list, a dictionary."""

    steps = 0

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen, self.table = kind, [], {"steps": 0}

    def forward(self, weight):
        if self.kind == "number":
            self.steps += 1
        elif self.kind == "list":
            self.seen.append(1)
        else:
            self.table["steps"] += 1
        return weight * (1 + 0.1 * (self.steps + len(self.seen) + self.table["steps"]))


class Overwriting(nn.Module):
    """Writes the very parameter that it is made of."""

    def forward(self, weight):
        with torch.no_grad():
            weight.clamp_(-0.01, 0.01).mul_(0.9)
        return weight * 1.0


OUTSIDE = [0]


class GlobalState(nn.Module):
    def forward(self, weight):
        OUTSIDE[0] += 1
        return weight * OUTSIDE[0]


STATEFUL = {
    "spectral_norm": (spectral, "spectral_norm in training"),
    "random": (by(Dropped), "Dropped.*random numbers"),
    "random of Python": (by(lambda: Dropped(lambda w: torch.tensor(random.random()))), "random numbers"),
    "random of NumPy": (
        by(lambda: Dropped(lambda w: torch.tensor(np.random.rand(*w.shape)))),
        "random numbers",
    ),
    "dropout": (by(lambda: nn.Dropout(0.5)), "Dropout.*random numbers"),
    "a generator of its own": (by(Generated), "Generated"),
    "a counter": (by(Counting), "Counting.*changes calls"),
    "a counter behind autograd": (by(CountingBehind), "CountingBehind.*changes calls"),
    "a replaced buffer": (by(Averaging), "Averaging.*changes mean"),
    "a number": (by(lambda: Stepping("number")), "changes steps"),
    "a list": (by(lambda: Stepping("list")), "changes seen"),
    "a dictionary": (by(lambda: Stepping("dict")), "changes table"),
    "its own parameter": (by(Overwriting, unsafe=True), "changes original"),
    "one after a pure one": (lambda m: (weight_norm(m), by(Counting)(m)), "_WeightNorm, Counting"),
    "something outside": (by(GlobalState), "differs each time"),
}


def state_of(model):
    """All that a forward may look at: tensors with their versions and places, attributes, random numbers."""
    tensors = {
        name: (t.detach().clone(), t._version, t.data_ptr(), id(t))
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    attributes = [
        copy.deepcopy(
            {k: v for k, v in vars(m).items() if k in ("steps", "seen", "table", "scale", "training")}
        )
        for m in model.modules()
    ]
    generators = [
        g.get_state() for m in model.modules() for g in vars(m).values() if isinstance(g, torch.Generator)
    ]
    draws = [
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.from_numpy(np.random.get_state()[1].copy()),
    ]
    return tensors, attributes, generators + draws, np.random.get_state()[2]


def assert_same_state(model, before):
    now = state_of(model)
    assert now[0].keys() == before[0].keys() and now[1] == before[1] and now[3] == before[3]
    for name, (tensor, *rest) in before[0].items():
        assert torch.equal(now[0][name][0], tensor) and list(now[0][name][1:]) == rest, name
    assert all(map(torch.equal, now[2], before[2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_weight_without_one_value_is_refused_and_stays_as_it_was(kind, backend):
    make, says = STATEFUL[kind]
    model = with_weights(make).train()
    before = state_of(model)
    with pytest.raises(
        UnsupportedWeightError,
        match=rf"^model\.layers\.0\.self_attn\.o_proj .*{says}.*model\.eval\(\).*remove_param",
    ) as error:
        fastheads.HookManager(model, backend=backend)
    assert "einsum" not in str(error.value) and "\n" not in str(error.value)
    if kind != "something outside":
        assert_same_state(model, before)


PURE = {
    "weight_norm": weight_norm,
    "spectral_norm in evaluation": spectral,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal by householder": lambda m: parametrizations.orthogonal(
        m, orthogonal_map="householder", use_trivialization=False
    ),
    "the user's": by(Scaled),
    "two": lambda m: (weight_norm(m), by(Scaled)(m)),
    "dropout in evaluation": by(lambda: Dropped(always=False)),
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "pruned twice": lambda m: (
        prune.random_unstructured(m, "weight", 0.5),
        prune.ln_structured(m, "weight", 0.2, n=2, dim=0),
    ),
}


def weight_by_identity(module):
    """`[out, in]` in float64, by what the module does to an identity."""
    with torch.no_grad():
        return copy.deepcopy(module).double()(torch.eye(96, dtype=torch.float64)).T


@pytest.mark.parametrize("backend", [*BACKENDS, "basic"])
@pytest.mark.parametrize("kind", PURE)
def test_a_computed_weight_is_the_one_that_acts_and_reading_it_leaves_no_trace(kind, backend):
    model = with_weights(PURE[kind])
    with torch.no_grad():
        model(input_ids=IDS)
        plain = model(input_ids=IDS).logits
    weights = [weight_by_identity(module) for module in projections(model)]
    before, sites = state_of(model), fastheads.find_sites(model)
    manager = (
        BasicHookManager(model, "all")
        if backend == "basic"
        else fastheads.HookManager(model, "all", backend=backend)
    )
    with torch.no_grad(), captured_inputs(projections(model)) as inputs, manager as hooks:
        assert_same_state(model, before)
        logits = model(input_ids=IDS).logits
        results = hooks.get_results()
    assert torch.equal(logits, plain)
    assert_same_state(model, before)
    assert_results(results, sites, inputs, [None], "all", 5e-6, weights=weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [spectral, by(lambda: Dropped(always=False))])
def test_from_evaluation_to_training_and_back(make, backend):
    """The modes between forwards: what has one weight counts, what has none is refused, out of the forward."""
    model = with_weights(make)
    with fastheads.HookManager(model, "all", backend=backend) as hooks, torch.no_grad():
        model(input_ids=IDS)
        model.train()
        with pytest.raises(UnsupportedWeightError, match=r"o_proj has a weight.*model\.eval\(\)"):
            model(input_ids=IDS)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
        model.eval()
        with captured_inputs(projections(model)) as inputs:
            model(input_ids=IDS)
        hooks.reset()
        with captured_inputs(projections(model)) as inputs:
            model(input_ids=IDS)
        weights = [weight_by_identity(module) for module in projections(model)]
        assert_results(hooks.get_results(), hooks.sites, inputs, [None], "all", 5e-6, weights=weights)


class ByMode(nn.Module):
    """One weight in training, another in evaluation: only the part itself is switched."""

    def forward(self, weight):
        return weight * (3.0 if self.training else 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "change"),
    [
        (by(ByMode), lambda part: part.train()),
        (by(Scaled), lambda part: setattr(part, "scale", 3.0)),
        (by(Scaled), lambda part: part.rows.mul_(2)),
        (by(lambda: nn.Sequential(nn.Identity())), lambda part: part.append(Scaled())),
        (
            by(nn.Identity),
            lambda part: parametrize.register_parametrization(part.owner(), "weight", Scaled()),
        ),
        (by(Scaled), lambda part: setattr(part, "rows", part.rows * 2)),
    ],
)
def test_what_a_weight_is_made_of_changes_between_forwards(make, change, backend):
    model = with_weights(make)
    sites, wanted = fastheads.find_sites(model), []
    with fastheads.HookManager(model, "token", backend=backend) as hooks, torch.no_grad():
        for step in range(2):
            if step:
                part = projections(model)[1].parametrizations.weight[0]
                vars(part)["owner"] = lambda: projections(model)[1]
                change(part)
            weights = [weight_by_identity(module) for module in projections(model)]
            with captured_inputs(projections(model)) as inputs:
                model(input_ids=tokens(2, 6, seed=step))
            z = inputs[1][0].view(-1, 4, 24)
            wanted.append(torch.einsum("ohd,nhd->nho", weights[1].view(64, 4, 24), z).norm(dim=-1))
        got = hooks.get_results()["head_residual_contribution_norm"]
    values = torch.cat(wanted)
    np.testing.assert_allclose(got["mean"][1], values.mean(0), rtol=5e-6)
    np.testing.assert_allclose(got["max"][1], values.amax(0), rtol=5e-6)
    assert len(sites) == 2


def test_autocast_rounds_no_weight_that_is_computed():
    model = with_weights(by(lambda: nn.Linear(96, 96, bias=False)))
    plain = fastheads.models.weights.dense_weight(fastheads.find_sites(model)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastheads.models.weights.dense_weight(fastheads.find_sites(model)[0]), plain)


# ---------------------------------------------------------------- parametrize.cached()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attaching_within_cached_leaves_gradients_to_the_weights(backend):
    model = with_weights(weight_norm).train()
    with parametrize.cached():
        with fastheads.HookManager(model, "all", backend=backend) as hooks:
            assert not parametrize._cache
            model(input_ids=IDS, labels=IDS).loss.backward()
            hooks.get_results()
    for projection in projections(model):
        assert projection.parametrizations.weight.original1.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_cached_acts_until_the_cache_is_left(backend):
    model = with_weights(weight_norm)
    wanted = []

    def forward(weight):
        with captured_inputs(projections(model)) as inputs:
            model(input_ids=IDS)
        z = inputs[1][0].view(-1, 4, 24)
        wanted.append(torch.einsum("ohd,nhd->nho", weight.view(64, 4, 24), z).norm(dim=-1))

    with fastheads.HookManager(model, "token", backend=backend) as hooks, torch.no_grad():
        old = weight_by_identity(projections(model)[1])
        with parametrize.cached():
            forward(old)
            projections(model)[1].parametrizations.weight.original0.mul_(3)
            forward(old)  # still
        forward(3 * old)
        projections(model)[1].parametrizations.weight.original0.mul_(2)
        forward(6 * old)
        got = hooks.get_results()["head_residual_contribution_norm"]
    values = torch.cat(wanted)
    np.testing.assert_allclose(got["mean"][1], values.mean(0), rtol=5e-6)
    np.testing.assert_allclose(got["std"][1], values.std(0), rtol=1e-4)


# ---------------------------------------------------------------- properties, hooks, adapters


class Quantizing(nn.Linear):
    """A weight that is a property over the parameter."""

    @property
    def weight(self):
        return torch.round(self._parameters["weight"] * 8) / 8


class Noisy(nn.Linear):
    @property
    def weight(self):
        own = self._parameters["weight"]
        return own + 0.01 * torch.randn_like(own)


def as_kind(kind):
    def make(module):
        module.__class__ = kind

    return make


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_a_property(backend):
    model = with_weights(as_kind(Quantizing))
    weights = [torch.round(m._parameters["weight"].detach() * 8) / 8 for m in projections(model)]
    with (
        torch.no_grad(),
        captured_inputs(projections(model)) as inputs,
        fastheads.HookManager(model, "all", backend=backend) as hooks,
    ):
        model(input_ids=IDS)
        assert_results(hooks.get_results(), hooks.sites, inputs, [None], "all", 5e-6, weights=weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_property_that_draws_is_refused(backend):
    model = with_weights(as_kind(Noisy))
    before = state_of(model)
    with pytest.raises(UnsupportedWeightError, match="a property of Noisy.*random numbers"):
        fastheads.HookManager(model, backend=backend)
    assert_same_state(model, before)


def test_a_tensor_set_over_the_parameter_is_refused():
    model = with_weights(lambda module: vars(module).update(weight=torch.ones(64, 96)))
    with pytest.raises(UnsupportedWeightError, match="no parameter"):
        fastheads.HookManager(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_hooks_are_refused_and_stay_as_they_were(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = with_weights(make).train()
    before = state_of(model)
    with pytest.raises(UnsupportedWeightError, match=r"no parameter: a hook.*parametrizations"):
        fastheads.HookManager(model)
    assert_same_state(model, before)


class Inverted(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask * (t > 0)

    def apply_mask(self, module):
        return module.weight_orig * (1 - module.weight_mask)


def test_pruning_of_another_kind_is_refused():
    model = with_weights(lambda module: Inverted.apply(module, "weight"))
    with pytest.raises(UnsupportedWeightError, match="no parameter"):
        fastheads.HookManager(model)


def lora_of(model, **options):
    import peft

    config = peft.LoraConfig(
        r=4, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_a_merged_and_disabled_adapter_moves_nothing(dtype, monkeypatch):
    import peft

    model = lora_of(build(num_hidden_layers=2, dtype=dtype)).to(dtype)
    kind = peft.tuners.lora.layer.Linear
    own = kind.get_delta_weight

    def putting_new_data(self, adapter):  # as releases of PEFT did
        delta = own(self, adapter)
        self.lora_A[adapter].weight.data = self.lora_A[adapter].weight.data.clone()
        return delta

    monkeypatch.setattr(kind, "get_delta_weight", putting_new_data)
    model.merge_adapter()
    before = state_of(model)
    with model.disable_adapter(), fastheads.HookManager(model):
        pass
    assert_same_state(model, before)


def test_dora_that_is_merged_and_then_disabled_is_refused():
    model = lora_of(build(num_hidden_layers=2), use_dora=True)
    model.merge_adapter()
    fastheads.HookManager(model).remove()  # the weight is what it is
    with model.disable_adapter(), pytest.raises(UnsupportedWeightError, match="DoRA"):
        fastheads.HookManager(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_computed_weight_within_an_adapter(backend):
    model = lora_of(build(num_hidden_layers=2))
    for projection in projections(model):
        weight_norm(projection.lora_A["default"])
        weight_norm(projection.base_layer)
    with fastheads.HookManager(model, "all", backend=backend) as hooks, torch.no_grad():
        model(input_ids=IDS)
        hooks.reset()
        projections(model)[1].lora_A["default"].parametrizations.weight.original0.mul_(3)
        weights = [weight_by_identity(module) for module in projections(model)]
        with captured_inputs(projections(model)) as inputs:
            model(input_ids=IDS)
        assert_results(hooks.get_results(), hooks.sites, inputs, [None], "all", 1e-5, weights=weights)


# ---------------------------------------------------------------- weights that change during a forward


def doubled(module, _args):
    module.weight.mul_(1.5)


def replaced(module, _args):
    module.weight = nn.Parameter(module.weight.detach() * 1.5)


def halved_after(module, _args, _output):
    module.weight.mul_(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [doubled, replaced, halved_after])
def test_a_weight_that_changes_during_a_forward_is_refused_by_every_backend(change, backend):
    model = build(num_hidden_layers=2)
    module = projections(model)[1]
    if change is halved_after:
        module.register_forward_hook(change)
    else:
        module.register_forward_pre_hook(change)
    with fastheads.HookManager(model, backend=backend) as hooks, torch.no_grad():
        for _ in range(2):
            with pytest.raises(StaleFactorError, match=r"layers\.1.*during a forward") as error:
                model(input_ids=IDS)
            assert "einsum" not in str(error.value)
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()
