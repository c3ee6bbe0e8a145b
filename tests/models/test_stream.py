"""The residual stream that an attention's output is added to, of every causal-LM family: against the sums in the model's forward.

Every addition of two tensors in a forward is recorded. The truth is the other term of the one that has what the heads and the
bias add, by dense algebra, as a term; in parallel blocks the MLP's output is added first.
"""

import copy
import re
from types import SimpleNamespace

import families
import pytest
import torch
from tiny_models import build, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import fastheads
from fastheads import Family, register_family
from fastheads.errors import OptionError
from fastheads.models import families as tables
from fastheads.models.residual import UnknownUpdateError, update_of
from fastheads.models.stream import UnknownStreamError, stream_of

MASK = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
COVERED = [f for f in families.FAMILIES if f not in families.REFUSED and families.why_missing(f) is None]
# Families of which some or all sites are refused, and the words of the refusal.
UNKNOWN = {
    "beam": "scales the sum with the depth",
    "gemma3n": "several residual streams",
    "gemma3n_text": "several residual streams",
    "hy_v4": "several residual streams",
    "inkling_text": "convolves the attention's output",
    "inkling2_text": "convolves the attention's output",
    "mllama": "a gate comes between",
    "qwen4_exp": "several residual streams",
    "qwen4_exp_text": "several residual streams",
    "zamba": "goes through another layer",
    "zamba2": "goes through another layer",
    "zaya": "learnt numbers of each channel",
}
# Layers that add the output of their attention to that of their MLP or another mixer, or to a bias of their own, first.
PARALLEL = re.compile(
    r"^(CodeGenBlock|FalconDecoderLayer|FalconH1DecoderLayer|GPTJBlock|GPTNeoX(Japanese)?Layer|PhiDecoderLayer)$"
)
# Configurations under which layers add to something else, or in another place.
VARIANTS = {
    "bloom": [dict(apply_residual_connection_post_layernorm=True)],
    "falcon": [
        dict(new_decoder_architecture=True),
        dict(new_decoder_architecture=True, num_ln_in_parallel_attn=1),
        dict(parallel_attn=False, new_decoder_architecture=False),
        dict(alibi=True),
    ],
    "gpt_neox": [dict(use_parallel_residual=False)],
    "opt": [dict(do_layer_norm_before=False)],
    "stablelm": [dict(use_parallel_residual=True)],
    "xmod": [dict(pre_norm=True)],
    "minimax": [dict(full_attn_alpha_factor=1.5, full_attn_beta_factor=0.5)],
    "granite": [dict(residual_multiplier=0.25)],
    "falcon_h1": [dict(attention_out_multiplier=0.5)],
}
CASES = [(family, {}) for family in COVERED]
CASES += [(family, changes) for family in VARIANTS if family in COVERED for changes in VARIANTS[family]]


class Additions(TorchDispatchMode):
    """Appends (term, other term, sum) of each addition of tensors of one shape to `events`."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        plain = function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs
        if not plain or not all(isinstance(a, torch.Tensor) and a.shape == args[0].shape for a in args):
            return function(*args, **(kwargs or {}))
        terms = [a.clone() for a in args]
        result = function(*args)
        self.events.append(SimpleNamespace(terms=terms, sum=result.clone()))
        return result


def disturb(model):
    """Give gains, scales and biases, that start as ones and zeros, other values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() <= 1 and parameter.is_floating_point():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def recorded(model, sources, batch, read=None):
    """The events of one forward, in order: additions, reads of streams, and projections; and references to the streams."""
    events, references, handles = [], [], []
    read = read or (lambda source, module, args, kwargs: source.read(args, kwargs))

    def reader(name, source):
        def hook(module, args, kwargs):
            stream = read(source, module, args, kwargs)
            references.append((name, stream, stream.clone()))
            events.append(SimpleNamespace(name=name, stream=stream.clone()))

        return source.module.register_forward_pre_hook(hook, with_kwargs=True)

    def projected(site):
        def hook(_module, args, output):
            x, output = args[0].clone().double(), output.clone().double()
            for name, stream, as_read in references:
                if name == site.name and not sources[name][1].is_overwritten:
                    assert torch.equal(stream, as_read)
            events.append(SimpleNamespace(name=site.name, x=x, output=output))

        return site.module.register_forward_hook(hook)

    for name, (site, source) in sources.items():
        handles += [reader(name, source), projected(site)]
    with torch.no_grad(), Additions(events):
        model(**batch)
    for handle in handles:
        handle.remove()
    return events, references


def added(site, update, x):
    """What all heads and the bias add, `[B, S, O]`: by dense algebra in float64, from the update's norm and multiplier alone."""
    with torch.no_grad():
        exact = copy.deepcopy(site.module).double()
        zero = exact(torch.zeros_like(x[:1, :1]))[0, 0]  # the bias
        z = x.view(*x.shape[:-1], site.num_heads, site.head_dim)
        total = zero
        for h in range(site.num_heads):
            alone = torch.zeros_like(z)
            alone[..., h, :] = z[..., h, :]
            total = total + exact(alone.view_as(x)) - zero
        if update.norm is not None:
            ones = torch.ones(1, 1, total.shape[-1])
            gain = update.norm(ones)[0, 0].double() * (1 + update.eps) ** 0.5
            total = gain * total / (total.square().mean(-1, keepdim=True) + update.eps).sqrt()
        return update.multiplier * total


def near(a, b, tolerance):
    a, b = a.double().flatten(), b.double().flatten()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())


def other_terms(additions, term, tolerance=1e-4):
    """(other term, sum) of each addition that has the term."""
    return [(a.terms[1 - i], a.sum) for a in additions for i in (0, 1) if near(a.terms[i], term, tolerance)]


def check(model, sources, batch, read=None, norms=True):
    """Each projection's output was added to the stream that was read last before it; returns how many were seen."""
    events, references = recorded(model, sources, batch, read)
    seen = 0
    for number, event in enumerate(events):
        if not hasattr(event, "x"):
            continue
        site, source = sources[event.name]
        streams = [e.stream for e in events[:number] if hasattr(e, "stream") and e.name == event.name]
        assert streams, f"{site.name}: {source} is not called before it"
        stream = streams[-1]
        assert stream.numel() == event.output.numel() and stream.shape[-1] == event.output.shape[-1]
        additions = [e for e in events[number:] if hasattr(e, "sum")]
        branch = added(site, update_of(model, site), event.x)
        found = other_terms(additions, branch)
        assert found, f"{site.name}: what the heads add is added nowhere"
        other, total = found[0]
        parallel = PARALLEL.search(type(source.module).__name__) and not near(other, stream, 1e-6)
        if parallel:
            found = [(o, t) for o, t in other_terms(additions, total) if near(o, stream, 1e-6)]
            assert found, f"{site.name}: {source} is not what the block's output is added to"
            assert near(stream.double().flatten() + branch.flatten() + other.flatten(), found[0][1], 1e-5)
        else:
            # Exactly what the model adds to: its multiplier is applied as the model does.
            assert torch.equal(other.flatten(), stream.flatten()), (
                f"{site.name}: {source} is not what it is added to"
            )
            assert near(stream.double().flatten() + branch.flatten(), total, 1e-5)
            if (
                norms and source.multiplier is None
            ):  # after such a sum, the sum is scaled too before it is a term again
                again = other_terms(additions[1:], total, 0.0)
                assert bool(again) != source.post_norm, f"{site.name}: {source}"
        seen += 1
    for name, stream, as_read in references:
        assert sources[name][1].is_overwritten or torch.equal(stream, as_read), f"{name}: the stream changed"
    return seen


def known_sources(model, sites):
    """By name: the sites whose update and stream are known, with the source; and the reasons of the others."""
    sources, refused = {}, {}
    for site in sites:
        try:
            update_of(model, site)
            sources[site.name] = site, stream_of(model, site)
        except (UnknownStreamError, UnknownUpdateError) as error:
            refused[site.name] = str(error)
    return sources, refused


def with_changes(monkeypatch, family, changes):
    plain = families.config
    monkeypatch.setattr(families, "config", lambda name: type(c := plain(name))(**{**c.to_dict(), **changes}))
    return families.build(family)


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
@pytest.mark.filterwarnings("ignore")
def test_family(family, changes, monkeypatch):
    model = with_changes(monkeypatch, family, changes) if changes else families.build(family)
    disturb(model)
    sites = fastheads.find_sites(model)
    for site in sites:
        if family not in UNKNOWN:
            stream_of(model, site)
    sources, refused = known_sources(model, sites)
    assert bool(refused) == (family in UNKNOWN), refused
    for site in sites:
        if site.name in refused:
            with pytest.raises(UnknownStreamError, match=UNKNOWN[family]):
                stream_of(model, site)
    seen = check(model, sources, families.batch(family, MASK))
    assert seen >= len(sources)


SEQ2SEQ = ["bart", "bigbird_pegasus", "fsmt", "m2m_100", "mbart", "switch_transformers", "t5", "umt5"]


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.filterwarnings("ignore")
def test_cross_attention_adds_to_the_sum_of_the_self_attention(family):
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    settings = families.config(family)
    torch.manual_seed(0)
    kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(settings)]
    model = kind._from_config(settings, attn_implementation="eager").float().eval()
    disturb(model)
    sites = fastheads.find_sites(model)
    assert any(re.search("encoder_attn|EncDecAttention", site.name) for site in sites)
    sources, refused = known_sources(model, sites)
    assert not refused
    batch = families.batch(family, MASK)
    assert check(model, sources, batch | dict(decoder_input_ids=batch["input_ids"])) == len(sites)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gptj", "bert", "bloom", "longcat_flash", "doge", "minimax", "hrm_text"]
)
@pytest.mark.parametrize("wrong", ["noise", "normed", "scaled", "next"])
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_stream_fails_the_check(family, wrong):
    """What the tests above would overlook shows here: each tensor is near the stream, or of the same layer."""
    model = families.build(family)
    disturb(model)
    sources, _ = known_sources(model, fastheads.find_sites(model))
    before = {}

    def read(source, module, args, kwargs):
        stream = source.read(args, kwargs)
        if wrong == "noise":
            return stream + 1e-4 * torch.randn_like(stream)
        if wrong == "normed":
            return torch.nn.functional.rms_norm(stream, stream.shape[-1:])
        if wrong == "scaled":
            return 1.001 * stream
        before[module], stream = stream, before.get(module, next(iter(before.values()), stream.flip(0)))
        return stream  # that of the layer before

    with pytest.raises(AssertionError, match="what"):
        check(model, sources, families.batch(family, MASK), read)


# ---------------------------------------------------------------- layers that are not as they were written


def stream_texts(model):
    return [str(stream_of(model, site)) for site in fastheads.find_sites(model)]


def replace_forward(model, monkeypatch, forward):
    """As packages do that patch transformers: the class's forward is another function."""
    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)


def attended(layer, hidden_states, kwargs):
    return layer.self_attn(hidden_states=hidden_states, **kwargs)


def in_place_before(self, hidden_states, **kwargs):
    residual = stream = hidden_states
    normed = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=normed, **kwargs)
    residual.mul_(0.5)
    return stream + hidden_states


def in_place_sum(self, hidden_states, **kwargs):
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states += branch
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def in_two_places(self, hidden_states, **kwargs):
    normed = self.input_layernorm(hidden_states)
    branch, _ = self.self_attn(hidden_states=normed, **kwargs)
    if kwargs.get("early"):
        return normed + branch
    return hidden_states + branch


def opaque(self, hidden_states, **kwargs):
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    return torch.lerp(hidden_states, branch, 0.5)


def mixed(self, hidden_states, **kwargs):
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    return torch.stack([hidden_states, branch]).sum(0)


def of_a_name(self, hidden_states, **kwargs):
    attend = self.self_attn
    branch, _ = attend(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    return hidden_states + branch


def not_called(self, hidden_states, **kwargs):
    branch, _ = attended(self, self.input_layernorm(hidden_states), kwargs)
    return hidden_states + branch


def half(self, hidden_states, **kwargs):
    stream = 0.5 * hidden_states
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    return stream + branch


def half_of_the_module(self, hidden_states, **kwargs):
    stream = hidden_states * self.hidden_size
    branch, _ = self.self_attn(hidden_states=self.input_layernorm(stream), **kwargs)
    return stream + branch


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (in_place_before, "changes what it adds to in place"),
        (in_two_places, "adds self_attn to several things"),
        (opaque, "not by a sum"),
        (mixed, "not by a sum"),
        (not_called, "does not call self_attn"),
        (half, "does not show|not known"),
    ],
)
def test_a_forward_that_does_something_else_is_refused(forward, says, monkeypatch):
    model = build()
    replace_forward(model, monkeypatch, forward)
    with pytest.raises(UnknownStreamError, match=says):
        stream_texts(model)


@pytest.mark.parametrize("forward", [in_place_sum, of_a_name, half_of_the_module])
def test_a_forward_of_another_package_is_read(forward, monkeypatch):
    model = build()
    replace_forward(model, monkeypatch, forward)
    sources, refused = known_sources(model, fastheads.find_sites(model))
    assert not refused and len(sources) == 3
    assert {source.is_overwritten for _, source in sources.values()} == {forward is in_place_sum}
    assert check_streams(model, sources) == 3


def check_streams(model, sources):
    return check(model, sources, dict(input_ids=tokens(2, 5)), norms=False)


def test_a_forward_without_source_is_refused(monkeypatch):
    model, space = build(), {}
    exec("def forward(self, hidden_states, **kwargs):\n    return hidden_states", space)
    replace_forward(model, monkeypatch, space["forward"])
    with pytest.raises(UnknownStreamError, match="source of its forward cannot be read"):
        stream_texts(model)


def test_a_forward_of_one_layer_that_was_replaced_is_refused():
    model = build()
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    sources, refused = known_sources(model, fastheads.find_sites(model))
    assert len(sources) == 2 and "forward has been replaced" in refused["model.layers.1.self_attn.o_proj"]


def test_layers_with_hooks_of_accelerate_are_known():
    hooks = pytest.importorskip("accelerate.hooks")
    model = build()
    plain = stream_texts(model)
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert stream_texts(model) == plain
    assert check_streams(model, known_sources(model, fastheads.find_sites(model))[0]) == 3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_layers_show_the_stream_in_the_forward():
    """In the backward, projections run again: then the layer may not be called, so that what was read last is another's."""
    found = []
    for checkpointed in (False, True):
        model, seen = build().train(), []
        if checkpointed:
            model.gradient_checkpointing_enable()
        for _, source in known_sources(model, fastheads.find_sites(model))[0].values():
            source.module.register_forward_pre_hook(
                lambda m, a, k, source=source, seen=seen: seen.append(source.read(a, k).detach().clone()),
                with_kwargs=True,
            )
        loss = model(input_ids=tokens(2, 5), labels=tokens(2, 5), use_cache=False).loss
        found.append(list(seen))
        loss.backward()
    assert len(found[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adapters_and_compiled_layers_are_called_as_what_they_wrap():
    peft = pytest.importorskip("peft")
    model = build()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    assert stream_texts(model) == ["input of LlamaDecoderLayer"] * 3
    adapted = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["o_proj"], r=2))
    assert stream_texts(adapted) == ["input of LlamaDecoderLayer"] * 3


def test_the_stream_by_position_and_by_name():
    model = build()
    source = stream_of(model, fastheads.find_sites(model)[0])
    stream = torch.randn(2, 3, 64)
    assert source.read((stream,), {}) is stream and source.read((), {"hidden_states": stream}) is stream
    for args, kwargs in (((), {}), ((None,), {}), ((), {"attention_mask": stream})):
        with pytest.raises(UnknownStreamError, match="LlamaDecoderLayer was called without"):
            source.read(args, kwargs)


# ---------------------------------------------------------------- other packages


class Outside(torch.nn.Module):
    """A layer of another package: it adds its attention to what its own norm gives."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.before, self.own = layer.self_attn, layer.input_layernorm, torch.nn.Identity()

    def forward(self, hidden_states, **kwargs):
        stream = self.own(hidden_states * 2)
        return stream + self.self_attn(hidden_states=self.before(stream), **kwargs)[0]


@pytest.fixture
def outside(monkeypatch):
    monkeypatch.setattr(tables, "_registered", {})
    monkeypatch.setattr(tables, "_registered_found", tables._no_classes())
    model = build()
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = Outside(layer)
    return model


def test_a_layer_of_another_package_is_refused(outside):
    with pytest.raises(UnknownStreamError, match="Outside, which is not of transformers"):
        stream_texts(outside)


@pytest.mark.parametrize("stream", [None, "before"])
def test_a_family_says_where_the_stream_is(outside, stream):
    """Or the source of its layers does."""
    register_family(Family("outside", layer="^Outside$", stream=stream))
    sources, refused = known_sources(outside, fastheads.find_sites(outside))
    assert not refused and {source.module for _, source in sources.values()} == {
        layer.before for layer in outside.model.layers
    }
    assert check_streams(outside, sources) == 3


def test_a_family_that_says_it_wrongly_fails_the_check(outside):
    register_family(Family("outside", layer="^Outside$", stream="."))
    sources, _ = known_sources(outside, fastheads.find_sites(outside))
    assert str(next(iter(sources.values()))[1]) == "input of Outside"
    with pytest.raises(AssertionError, match="is not what it is added to"):
        check_streams(outside, sources)


@pytest.mark.parametrize("key", ["stream_unknown", "update_unknown"])
def test_a_family_says_that_it_is_unknown(outside, key):
    register_family(Family("outside", layer="^Outside$", **{key: "it is secret"}))
    with pytest.raises(UnknownStreamError, match="Outside is not known: it is secret"):
        stream_texts(outside)


def test_a_family_that_does_not_fit(outside):
    register_family(Family("outside", layer="^Outside$", stream="elsewhere"))
    with pytest.raises(OptionError, match="'outside'.*'elsewhere', which a Outside has not"):
        stream_texts(outside)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (dict(layer="^A$", stream=""), "stream must be a path inside the layer"),
        (dict(layer="^A$", stream="../norm"), "stream must be a path inside the layer"),
        (dict(layer="^A$", stream_unknown=""), "stream_unknown must be a reason"),
        (dict(attention="^A$", stream="."), "stream needs layer="),
    ],
)
def test_nonsense(facts, says):
    with pytest.raises(OptionError, match=says):
        Family("outside", **facts)
