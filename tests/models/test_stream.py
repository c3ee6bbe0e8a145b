"""The residual stream that an attention's output is added to, of every causal-LM family: against the sums that the model computes.

Every addition of two tensors in a forward is recorded. The truth is the other term of the one that has what the heads and the
bias add, by dense algebra, as a term; in parallel blocks the MLP's output is added first.
"""

import copy
import re
from types import SimpleNamespace

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastheads
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


def check(model, sources, batch, read=None):
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
            if source.multiplier is None:  # after such a sum, the sum is scaled too before it is a term again
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
