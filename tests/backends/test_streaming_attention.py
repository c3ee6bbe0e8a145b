"""The streaming attention against dense attention in float64, written out here."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from fastheads.backends.streaming_attention import (
    Window,
    attention_beyond,
    check_distance,
    places_of,
    streamed,
    streaming_attention,
)
from fastheads.models.attention import AttentionCall
from fastheads.stats.token_layout import TokenLayout

BATCH, SEQ, WIDTH = 2, 150, 8
CPU = torch.device("cpu")


def call(heads=4, kv_heads=2, seed=0, **changes):
    torch.manual_seed(seed)
    given = dict(
        module=torch.nn.Module(),
        query=torch.randn(BATCH, heads, SEQ, WIDTH) * 2,
        key=torch.randn(BATCH, kv_heads, SEQ, WIDTH) * 2,
        value=torch.randn(BATCH, kv_heads, SEQ, WIDTH + 3),
        mask=None,
        scaling=0.4,
    )
    return AttentionCall(**{**given, **changes})


def dense(call, seen):
    """Attention in float64; `seen` bool [B, S, S]. Returns its output [B, S, H, Dv] and the probabilities [B, H, S, S]."""
    groups = call.query.shape[1] // call.key.shape[1]
    q = call.query.double()
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (call.key, call.value))
    scores = q @ k.transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask is not None and call.mask.dim() == 4:
        added = call.mask if call.mask.dtype != torch.bool else torch.where(call.mask, 0.0, -torch.inf)
        scores = scores + added.double()
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.double()[None, :, None, None].expand(BATCH, -1, SEQ, 1)
        share = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        share = scores.softmax(dim=-1)
    return (share @ v).transpose(1, 2), share


def places_by_loops(valid, cu_seqlens):
    """(sequence, position) of each token, None for padding."""
    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    found = []
    for row in range(BATCH):
        count, here = {}, []
        for token in range(SEQ):
            flat = row * SEQ + token
            sequence = (row, sum(flat >= bound for bound in bounds))
            if not valid[row, token]:
                here.append(None)
                continue
            here.append((sequence, count.get(sequence, 0)))
            count[sequence] = count.get(sequence, 0) + 1
        found.append(here)
    return found


def allowed(places, window=None):
    """What the queries see, bool [B, S, S]; padding sees itself."""
    numbers = [[(-1, -1) if p is None else (p[0][0] * SEQ + p[0][1], p[1]) for p in row] for row in places]
    sequence, position = torch.tensor(numbers).unbind(-1)
    token = torch.arange(SEQ)
    found = (token[:, None] >= token) & (sequence[:, :, None] == sequence[:, None]) & (sequence >= 0)[:, None]
    if window is not None:
        i, j = position[:, :, None], position[:, None]
        found &= (j < window.sink) | (i - j < window.window)
    return found | torch.eye(SEQ, dtype=torch.bool)


def padded(side):
    valid = torch.ones(BATCH, SEQ, dtype=torch.bool)
    if side == "left":
        valid[0, :37], valid[1, :1] = False, False
    elif side == "right":
        valid[1, -61:] = False
    else:
        valid[0, 20:40], valid[1, 5], valid[1, 140:] = False, False, False
    return valid


def of_sequences(*lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    assert bounds[-1] <= BATCH * SEQ
    return bounds


LAYOUTS = {
    "whole": (None, None),
    "left": (padded("left"), None),
    "right": (padded("right"), None),
    "holes": (padded("holes"), None),
    "packed": (torch.ones(BATCH, SEQ, dtype=torch.bool), of_sequences(90, 60, 30, 1, 119)),
    "packed and padded": (padded("holes"), of_sequences(90, 60, 30, 1, 119)),
}
KINDS = {
    "mha": dict(kv_heads=4),
    "gqa": {},
    "mqa": dict(kv_heads=1),
    "softcap": dict(softcap=3.0),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def check(call, layout, window):
    valid, cu_seqlens = LAYOUTS[layout]
    places = places_of(TokenLayout(valid, cu_seqlens=cu_seqlens), (BATCH, SEQ), window, CPU)
    known = places_by_loops(torch.ones(BATCH, SEQ, dtype=torch.bool) if valid is None else valid, cu_seqlens)
    beyond = torch.tensor([[p is not None and p[1] >= window.reach for p in row] for row in known])
    assert torch.equal(places.beyond, beyond)
    full, share = dense(call, allowed(known))
    near = allowed(known, window)
    want = torch.where(beyond[..., None, None], dense(call, near)[0], full)
    got, distance = streamed(call, full.to(call.value.dtype), places, window, check=True)
    check_distance(call.module, distance, torch.float32)
    real = torch.tensor([[p is not None for p in row] for row in known])
    assert torch.allclose(got.double()[real], want[real], rtol=1e-5, atol=1e-5)
    # Before that, the streaming attention is the whole one.
    early = real & ~beyond
    z = streaming_attention(call, places, window)
    assert torch.allclose(z.double()[early], full[early], rtol=1e-5, atol=1e-5)
    mass = (share * ~near[:, None]).sum(dim=-1).transpose(1, 2)
    assert torch.allclose(attention_beyond(call, places, window).double()[real], mass[real], atol=1e-5)
    return beyond


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_dense_attention_with_a_window(kind, layout):
    beyond = check(call(**KINDS[kind]), layout, Window(4, 20))
    assert beyond.any()


@pytest.mark.parametrize(
    "window",
    [Window(0, 20), Window(3, 1), Window(1, 64), Window(4, 65), Window(2, 100), Window(70, 9)],
    ids=str,
)
def test_windows_of_all_sizes(window):
    check(call(), "whole", window)
    check(call(), "left", window)
    check(call(), "packed", window)


@pytest.mark.parametrize("layout", ["whole", "left", "holes", "packed"])
@pytest.mark.parametrize("form", ["bool", "added", "added by head"])
def test_the_mask_of_the_model_is_kept(form, layout):
    torch.manual_seed(1)
    mask = torch.rand(BATCH, 1, SEQ, SEQ) < 0.8
    mask |= torch.eye(SEQ, dtype=torch.bool)
    if form == "added":
        mask = torch.where(mask, torch.randn(BATCH, 1, SEQ, SEQ), torch.finfo(torch.float32).min)
    if form == "added by head":
        mask = torch.randn(1, 4, SEQ, SEQ)
    check(call(mask=mask), layout, Window(4, 20))
    check(call(mask=mask, softcap=3.0), layout, Window(4, 20))


def test_a_block_mask_of_flex_attention_is_kept():
    """It is asked in single places; the same mask as a tensor says what is right."""
    torch.manual_seed(1)
    dense_mask = (torch.rand(BATCH, SEQ, SEQ) < 0.8) | torch.eye(SEQ, dtype=torch.bool)
    asked = create_block_mask(
        lambda b, h, q, k: dense_mask[b, q, k], B=BATCH, H=None, Q_LEN=SEQ, KV_LEN=SEQ, device="cpu"
    )
    for layout in ("whole", "holes"):
        valid, _ = LAYOUTS[layout]
        places = places_of(TokenLayout(valid), (BATCH, SEQ), Window(4, 20), CPU)
        got, want = (
            streaming_attention(call(mask=mask), places, Window(4, 20))
            for mask in (asked, dense_mask[:, None])
        )
        assert torch.equal(got[places.beyond], want[places.beyond])


def test_few_blocks_at_once_give_the_same(monkeypatch):
    monkeypatch.setattr("fastheads.backends.streaming_attention.SCRATCH_ELEMENTS", 1)
    for kind in ("gqa", "softcap"):
        for layout in ("whole", "packed and padded"):
            check(call(**KINDS[kind]), layout, Window(4, 20))


def test_a_window_as_long_as_the_sequence_changes_nothing():
    given, output = call(), torch.randn(BATCH, SEQ, 4, WIDTH + 3)
    for layout, (valid, cu_seqlens) in LAYOUTS.items():
        window = Window(0, SEQ) if layout == "whole" else Window(4, SEQ - 4)
        places = places_of(TokenLayout(valid, cu_seqlens=cu_seqlens), (BATCH, SEQ), window, CPU)
        assert not places.beyond.any()
        assert torch.equal(streamed(given, output, places, window)[0], output)


def test_bfloat16_sums_in_float32():
    given = call()
    half = call(**{name: getattr(given, name).bfloat16() for name in ("query", "key", "value")})
    places = places_of(TokenLayout(), (BATCH, SEQ), Window(4, 20), CPU)
    want, _ = dense(half, allowed(places_by_loops(torch.ones(BATCH, SEQ), None), Window(4, 20)))
    got = streaming_attention(half, places, Window(4, 20)).double()
    assert (got - want).norm() < 2**-8 * want.norm()  # the rounding of the output, and of the probabilities
