"""Streaming errors against dense attention in float64, and the rules of samples, files and merging."""

import math

import pytest
import torch

from fastheads import HeadProfile, HookManager
from fastheads.errors import ForwardError, MergeError, OptionError
from fastheads.models.sites import find_sites
from tests.support.dense_attention import attend, in_place_of_own, masks, places
from tests.support.tiny_models import build, tokens

SINK, WINDOW = 2, 7
NAMES = (
    "head_streaming_error",
    "head_streaming_error_square",
    "kv_group_streaming_error",
    "kv_group_streaming_error_square",
)


def values_of_tokens(model, ids, *, norm=None, multiplier=1.0, **kwargs):
    """By layer: the errors of heads [B, S, H] and of KV groups [B, S, K] of every token, in float64; and the tokens' places."""
    where = places(ids.shape, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    full, near = masks(where, SINK, WINDOW)
    lost, streams, outputs, groups = {}, {}, {}, {}

    def attention(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
        z, _ = attend(query, key, value, full, scaling, softcap, s_aux)
        z_w, _ = attend(query, key, value, near, scaling, softcap, s_aux)
        lost[module.layer_idx], groups[module.layer_idx] = z - z_w, key.shape[1]
        return z.to(value.dtype), None

    def keep(to, layer, what):
        return lambda module, args, kwargs, out=None: to.__setitem__(layer, what(args, kwargs, out).double())

    handles = []
    for n, layer in enumerate(model.model.layers):
        first = keep(streams, n, lambda args, kwargs, out: args[0] if args else kwargs["hidden_states"])
        handles.append(layer.register_forward_pre_hook(first, with_kwargs=True))
        behind = keep(outputs, n, lambda args, kwargs, out: out)
        handles.append(layer.self_attn.o_proj.register_forward_hook(behind, with_kwargs=True))
    with torch.no_grad(), in_place_of_own(model, attention):
        model(ids, use_cache=False, **kwargs)
    for handle in handles:
        handle.remove()
    found = {}
    for n, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight.detach().double().unflatten(1, (lost[n].shape[2], -1))
        added = multiplier * torch.einsum("bshd,ohd->bsho", lost[n], weight)
        if norm is not None:
            gain, eps = norm(layer.post_attention_layernorm)
            rms = (outputs[n].square().mean(-1) + eps).sqrt()
            added = added * gain.detach().double() / rms[..., None, None]
        size = streams[n].norm(dim=-1)[..., None]
        of_groups = added.unflatten(2, (groups[n], -1)).sum(3)
        found[n] = added.norm(dim=-1) / size, of_groups.norm(dim=-1) / size
    return found, where


def samples(values, where, token_agg, *, skip_first=0):
    """The samples [n, heads] of values [B, S, heads], by loops."""
    sequence, position = where
    least = max(SINK + WINDOW, skip_first)
    found = []
    for row in range(values.shape[0]):
        for name in sequence[row].unique():
            if name < 0:
                continue
            of = values[row, (sequence[row] == name) & (position[row] >= least)]
            if not len(of):
                continue
            found += list(of) if token_agg == "token" else [of[-1] if token_agg == "last" else of.mean(0)]
    return torch.stack(found)


def check(results, values, where, token_agg, *, rtol=1e-5, skip_first=0):
    for n, of_layer in values.items():
        for metric, each in zip(
            NAMES, (of_layer[0], of_layer[0] ** 2, of_layer[1], of_layer[1] ** 2), strict=True
        ):
            want = samples(each, where, token_agg, skip_first=skip_first)
            got = results[metric]
            heads = want.shape[1]
            assert got["count"][n, :heads].tolist() == [len(want)] * heads
            assert torch.allclose(got["mean"][n, :heads], want.mean(0), rtol=rtol, atol=1e-12)
            assert torch.allclose(got["max"][n, :heads], want.amax(0), rtol=rtol, atol=1e-12)
            assert (got["count"][n, heads:] == 0).all()


def layout(name, batch=2, seq=40):
    mask = torch.ones(batch, seq, dtype=torch.long)
    if name == "left":
        mask[0, :11] = 0
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if name == "right":
        mask[1, -13:] = 0
        return {"attention_mask": mask}
    if name == "short":
        mask[0, 5:] = 0
        return {"attention_mask": mask}
    if name == "packed":
        return {"position_ids": torch.cat([torch.arange(n) for n in (25, 4, 11)]).expand(batch, -1)}
    return {}


def measured(model, ids, token_agg="all", **kwargs):
    options = {name: kwargs.pop(name) for name in ("skip_first", "backend", "metrics") if name in kwargs}
    with (
        torch.no_grad(),
        HookManager(model, token_agg, streaming=(SINK, WINDOW), **options) as hooks,
    ):
        hooks.logits = model(ids, use_cache=False, **kwargs).logits
    return hooks


@pytest.mark.parametrize("padding", ["none", "left", "right", "short", "packed"])
@pytest.mark.parametrize("token_agg", ["all", "last", "token"])
def test_every_layout(token_agg, padding):
    model, ids, kwargs = build("llama", dtype=torch.float64), tokens(2, 40), layout(padding)
    hooks = measured(model, ids, token_agg, **kwargs)
    check(hooks.get_results(), *values_of_tokens(model, ids, **kwargs), token_agg)


FAMILIES = {
    "llama-bias": {},
    "qwen3": {},
    "gemma2": dict(norm=lambda norm: (1 + norm.weight, norm.eps)),
    "olmo2": dict(norm=lambda norm: (norm.weight, norm.variance_epsilon)),
    "granite": dict(multiplier=0.5),
    "gpt-oss": {},
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, padding):
    changes = dict(layer_types=["full_attention"] * 3) if family in ("gemma2", "gpt-oss") else {}
    changes |= dict(residual_multiplier=0.5) if family == "granite" else {}
    model, ids, kwargs = build(family, **changes), tokens(2, 40), layout(padding)
    hooks = measured(model, ids, **kwargs)
    found = values_of_tokens(model, ids, **FAMILIES[family], **kwargs)
    check(hooks.get_results(), *found, "all", rtol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("backend", ["loop", "einsum", "factored"])
def test_backends_and_numbers_of_kv_heads(backend, kv_heads):
    model, ids = build("llama", num_key_value_heads=kv_heads), tokens(2, 40)
    hooks = measured(model, ids, backend=backend)
    check(hooks.get_results(), *values_of_tokens(model, ids), "all")


def test_first_tokens_may_be_left_out_too():
    model, ids = build("llama"), tokens(2, 40)
    hooks = measured(model, ids, skip_first=20)
    check(hooks.get_results(), *values_of_tokens(model, ids), "all", skip_first=20)


def test_the_model_gives_the_same_bits_and_other_metrics_the_same_numbers():
    model, ids, kwargs = build("llama"), tokens(2, 40), layout("left")
    with torch.no_grad():
        plain = model(ids, use_cache=False, **kwargs).logits
        with HookManager(model, "all") as other:
            model(ids, use_cache=False, **kwargs)
    hooks = measured(model, ids, **kwargs)
    assert torch.equal(hooks.logits, plain)
    want = other.get_results()
    for metric in set(want) - {"metadata"}:
        assert torch.allclose(hooks.get_results()[metric]["mean"], want[metric]["mean"], rtol=1e-12)


def test_sequences_within_the_window_give_no_samples():
    model = build("llama")
    hooks = measured(model, tokens(2, SINK + WINDOW))
    results = hooks.get_results()
    assert results["head_output_norm"]["count"].eq(2).all()
    for name in NAMES:
        assert results[name]["count"].eq(0).all()


def test_some_metrics_only():
    hooks = measured(build("llama"), tokens(2, 40), metrics=NAMES[2:])
    assert set(hooks.get_results()) == {*NAMES[2:], "metadata"}


def test_files_and_merging(tmp_path):
    model = build("llama")
    whole = HookManager(model, "all", streaming=(SINK, WINDOW))
    parts = []
    with torch.no_grad():
        for seed in range(2):
            model(tokens(2, 40, seed=seed))
        whole.remove()
        for seed in range(2):
            with HookManager(model, "all", streaming=(SINK, WINDOW)) as hooks:
                model(tokens(2, 40, seed=seed))
            hooks.to_profile().save(tmp_path / f"{seed}.safetensors")
            parts.append(HeadProfile.load(tmp_path / f"{seed}.safetensors"))
    merged = HeadProfile.merge(parts)
    assert merged.metadata["streaming"] == {"sink": SINK, "window": WINDOW}
    for name in NAMES:
        for stat, values in whole.to_profile().statistics(name).items():
            got = merged.statistics(name)[stat]
            assert torch.allclose(torch.tensor(got), torch.tensor(values), equal_nan=True)
    with torch.no_grad(), HookManager(model, "all", streaming=(SINK, WINDOW + 1)) as hooks:
        model(tokens(2, 40))
    with pytest.raises(MergeError, match="streaming"):
        HeadProfile.merge([parts[0], hooks.to_profile()])


def test_the_caller_mask_chooses_samples_and_no_positions():
    """What `token_mask` leaves out is attended to all the same."""
    model, ids = build("llama"), tokens(2, 40)
    chosen = torch.zeros(2, 40, dtype=torch.bool)
    chosen[:, 30:33] = True
    with torch.no_grad(), HookManager(model, "token", streaming=(SINK, WINDOW)) as hooks:
        with hooks.token_mask(chosen):
            model(ids)
    values, _ = values_of_tokens(model, ids)
    got = hooks.get_results()["head_streaming_error"]
    for n in range(3):
        assert torch.allclose(got["mean"][n], values[n][0][:, 30:33].flatten(0, 1).mean(0), rtol=1e-4)


def test_layers_with_a_window_have_no_samples_and_a_reason():
    model = build("gemma2")
    results = measured(model, tokens(2, 40)).get_results()
    full = [kind == "full_attention" for kind in model.config.layer_types]
    assert results["head_streaming_error"]["count"].bool().any(1).tolist() == full
    reasons = results["metadata"]["streaming_unknown"]
    assert list(reasons) == [
        site.name for site, seen in zip(find_sites(model), full, strict=True) if not seen
    ]
    assert "sliding_attention" in reasons["model.layers.0.self_attn.o_proj"]


def test_what_changes_heads_before_the_projection_is_refused():
    model = build("llama")
    own = model.model.layers[1].self_attn.o_proj
    own.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    with pytest.raises(ForwardError, match=r"layers.1.self_attn.o_proj: .* \(a gate or a norm\)"):
        measured(model, tokens(2, 40))


def test_copies_of_heads_are_not():
    model, ids = build("llama"), tokens(2, 40)
    want = measured(model, ids).get_results()
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    got = measured(model, ids).get_results()
    assert torch.equal(got[NAMES[0]]["mean"], want[NAMES[0]]["mean"])


def test_a_failed_forward_counts_nothing():
    model, ids = build("llama"), tokens(2, 40)
    with torch.no_grad(), HookManager(model, "all", streaming=(SINK, WINDOW)) as hooks:
        handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        handle.remove()
        model(ids)
    check(hooks.get_results(), *values_of_tokens(model, ids), "all")


def test_decode_steps_are_refused():
    model = build("llama")
    with (
        HookManager(model, "all", streaming=(SINK, WINDOW)),
        pytest.raises(ForwardError, match="a cache must be empty"),
    ):
        model.generate(tokens(1, 20), max_new_tokens=3)


def test_models_without_any_such_attention_are_refused():
    import transformers as tf

    model = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(OptionError, match="no attention can be streamed: .* BloomAttention"):
        HookManager(model, "all", streaming=(SINK, WINDOW))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(streaming=4), "two numbers"),
        (dict(streaming=(4, 0)), "window must be a whole number of tokens, 1 or more, not 0"),
        (dict(streaming=(-1, 4)), "sink must be"),
        (dict(metrics=[NAMES[0]]), "needs streaming="),
        (dict(streaming=(4, 8), metrics=["head_output_norm"]), "which metrics leaves out"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(OptionError, match=text):
        HookManager(build("llama"), "all", **options)


def test_an_induction_head_ranks_first():
    """A head of the second layer that copies what followed the last occurrence of the token, of two layers built by hand."""
    vocab, head_dim = 32, 36
    model = build(
        "llama",
        vocab_size=vocab,
        hidden_size=3 * head_dim,
        head_dim=head_dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
        tie_word_embeddings=False,
    )
    size = vocab
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1.0)
        # No rotation: positions come from the masks of the oracle below alone.
        model.model.rotary_emb.inv_freq.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, :size] = torch.eye(vocab)
        here, before = slice(0, size), slice(head_dim, head_dim + size)
        out = slice(2 * head_dim, 2 * head_dim + size)
        first, second = (layer.self_attn for layer in model.model.layers)
        # Layer 0: the "token before" is written by a hook, since a rotation is needed to attend to it.
        # Layer 1, head 1: its query is the token, its key the token before, its value the token.
        for projection, source in ((second.q_proj, here), (second.k_proj, before), (second.v_proj, here)):
            projection.weight[head_dim : head_dim + size] = 0
            projection.weight[head_dim : head_dim + size, source] = torch.eye(size) * (
                4 if projection is not second.v_proj else 1
            )
        second.o_proj.weight[:, head_dim : head_dim + size] = 0
        second.o_proj.weight[out, head_dim : head_dim + size] = torch.eye(size)
        assert first is not second

        def write_before(module, args, kwargs):
            x = args[0].clone()
            x[:, 1:, before] = x[:, :-1, here]
            return (x, *args[1:]), kwargs

        model.model.layers[0].register_forward_pre_hook(write_before, with_kwargs=True)
        segment = torch.randperm(vocab)[:16]
        ids = torch.cat([segment, torch.randint(0, vocab, (24,)), segment])[None]
        with HookManager(model, "all", streaming=(2, 8)) as hooks:
            model(ids)
    profile = hooks.to_profile()
    for metric in NAMES:
        assert profile.rank(metric, descending=True)[0] == (1, 1)
        stats = profile.statistics(metric)["mean"]
        assert stats[1, 1] > 5 * sorted(stats.flatten())[-2]
    assert math.isfinite(stats.sum())
