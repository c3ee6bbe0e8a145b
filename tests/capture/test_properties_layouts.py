"""An attention may lay out its tokens as it likes: the moments equal the oracle, or a FastheadsError says why not.

The oracle takes the heads' outputs as the attention made them, `[batch, seq, width]`, before it lays them out anew.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from drawn import Options, Tally, assert_sequences, bits, cut, examples, options, sequences, small_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import tokens
from torch import nn
from torch.nn.functional import pad

import fastheads
from fastheads.errors import FastheadsError

HEADS, HEAD_DIM = 4, 4
WIDTH = HEADS * HEAD_DIM


def to_window(x, size, left=False):
    """Padded to a multiple of the window."""
    missing = -x.shape[1] % size
    return pad(x, (0, 0, missing, 0) if left else (0, 0, 0, missing))


def without_padding(x, mask):
    return x if mask is None else x[mask.bool()][None]


# What the projection is called with, one tensor a call.
LAYOUTS = {
    "as it is": lambda x, mask: [x],
    "[seq, batch]": lambda x, mask: [x.transpose(0, 1)],
    "[seq, batch], contiguous": lambda x, mask: [x.transpose(0, 1).contiguous()],
    "[seq, batch] by reshape": lambda x, mask: [x.reshape(x.shape[1], x.shape[0], -1)],
    "window of 2": lambda x, mask: [to_window(x, 2)],
    "window of 3": lambda x, mask: [to_window(x, 3)],
    "window of 4, left": lambda x, mask: [to_window(x, 4, left=True)],
    "window of 2, in chunks": lambda x, mask: list(to_window(x, 2).split(2, dim=1)),
    "every second": lambda x, mask: [x[:, ::2]],
    "the last": lambda x, mask: [x[:, -1:]],
    "without the first": lambda x, mask: [x[:, 1:]] if x.shape[1] > 1 else [x],
    "a prompt before": lambda x, mask: [torch.cat([x[:, :1], x], dim=1)],
    "two chunks of seq": lambda x, mask: list(x.chunk(2, dim=1)),
    "two chunks of batch": lambda x, mask: list(x.chunk(2)),
    "token by token": lambda x, mask: list(x.split(1, dim=1)),
    "row by row": lambda x, mask: list(x.split(1)),
    "all, then some": lambda x, mask: [x, x[:, :1]] if x.shape[1] > 1 else [x],
    "flat": lambda x, mask: [x.flatten(0, 1)],
    "flat, one row": lambda x, mask: [x.flatten(0, 1)[None]],
    "flat, one token a row": lambda x, mask: [x.flatten(0, 1)[:, None]],
    "4D": lambda x, mask: [x[:, None]],
    "repeated rows": lambda x, mask: [x.repeat_interleave(2, dim=0)],
    "without padding": lambda x, mask: [without_padding(x, mask)],
    "never": lambda x, mask: [],
}
ODD = [name for name in LAYOUTS if name != "as it is"]


class StandInAttention(nn.Module):
    """Heads that each see the tokens so far; what the projection gives goes nowhere."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, HEADS, HEAD_DIM
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layout = "as it is"
        self.made = []  # for the oracle

    def forward(self, hidden_states, mask):
        x = self.v_proj(hidden_states).cumsum(dim=1)
        self.made.append(x.detach().double())
        for piece in LAYOUTS[self.layout](x, mask):
            self.o_proj(piece)
        return x


class StandInDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(101, WIDTH)
        self.attentions = nn.ModuleList([StandInAttention(layer) for layer in range(2)])
        self.loops = 1

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for _ in range(self.loops):
            for attention in self.attentions:
                x = torch.tanh(x + attention(x, attention_mask))
        return x


class StandIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = StandInDecoder()

    def get_decoder(self):
        return self.decoder

    def forward(self, input_ids, attention_mask=None):
        return self.decoder(input_ids, attention_mask)


class OtherNames(StandInDecoder):
    """The same decoder; its arguments have names of its own."""

    def forward(self, ids, mask=None):
        return super().forward(ids, mask)


class OwnNames(StandIn):
    def __init__(self):
        super().__init__()
        self.decoder = OtherNames()


@dataclass(frozen=True)
class Call:
    batch: int
    seq: int
    layouts: tuple[str, str] = ("as it is", "as it is")
    loops: int = 1
    valid: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0
    via: str = "model"

    def run(self, model):
        ids = tokens(self.batch, self.seq, seed=self.seed)
        mask = None if self.valid is None else torch.tensor(self.valid)
        decoder = model.decoder
        decoder.loops = self.loops
        for attention, layout in zip(decoder.attentions, self.layouts, strict=True):
            attention.layout = layout
            attention.made.clear()
        with torch.no_grad():
            if self.via == "model":
                model(ids, mask)
            elif self.via == "decoder":
                decoder(input_ids=ids, attention_mask=mask)
            else:
                decoder(inputs_embeds=decoder.embed(ids), attention_mask=mask)

    @property
    def is_plain(self):
        """True where every call of a projection is with the tokens of the call, in order."""
        x = torch.arange(self.batch * self.seq * 2.0).view(self.batch, self.seq, 2)
        mask = None if self.valid is None else torch.tensor(self.valid)
        for layout in self.layouts:
            pieces = LAYOUTS[layout](x, mask)
            if len(pieces) != 1 or not torch.equal(pieces[0], x):
                return False
        return True

    @property
    def is_ambiguous(self):
        """True where rows and tokens are as many."""
        return self.batch == self.seq > 1


@st.composite
def batches(draw):
    """Calls whose layouts are the same in all of them, as a model's are."""
    layouts = ["as it is", "as it is"]
    if draw(st.integers(0, 2)):
        odd = draw(st.sampled_from(ODD))
        for layer in draw(st.sampled_from([(0,), (1,), (0, 1)])):
            layouts[layer] = odd
    loops = draw(st.sampled_from([1, 1, 1, 2, 3]))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        batch = draw(st.integers(1, 4))
        seq = batch if draw(st.integers(0, 3)) == 3 else draw(st.integers(1, 7))
        found.append(
            Call(
                batch,
                seq,
                layouts=tuple(layouts),
                loops=loops,
                valid=draw(st.none() | bits(batch, seq)),
                seed=draw(st.integers(0, 99)),
                via=draw(st.sampled_from(["model", "decoder", "embeds"])),
            )
        )
    return found


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return StandIn().eval()


def check(model, how, calls, tally):
    sites = fastheads.find_sites(model)
    want = [[] for _ in sites]
    proven = incomplete = False
    with how.attach(model) as hooks:
        for call in calls:
            try:
                call.run(model)
            except FastheadsError:
                assert not call.is_plain or (call.is_ambiguous and not proven), "refused without a reason"
                tally["refused"] += 1
                continue
            tally["measured"] += 1
            proven = proven or (call.is_plain and call.batch != call.seq)
            incomplete = incomplete or "never" in call.layouts
            for of_site, attention in zip(want, model.decoder.attentions, strict=True):
                for x in attention.made:
                    of_site += cut(x, sequences(call.batch, call.seq, call.valid))
        try:
            results = hooks.get_results()
        except FastheadsError:
            assert incomplete, "no results without a reason"
            tally["no results"] += 1
            return
    if incomplete and not any(want):  # nothing but padding
        return
    assert_sequences(results, sites, want, how)


@examples("layouts")
def test_layouts_of_any_form(model, number):
    tally = Tally()

    @settings(max_examples=number)
    @given(how=options(), calls=batches())
    def holds(how, calls):
        tally["examples"] += 1
        check(model, how, calls, tally)

    holds()
    tally.check(number, measured=0.4, refused=0.2)


@settings(max_examples=60)
@example(how=Options("token"), call=Call(2, 4, layouts=("window of 3", "window of 3")))
@example(how=Options("token"), call=Call(2, 4, valid=((0, 0, 1, 1), (1, 1, 1, 1))))
@given(how=options(), call=batches().map(lambda calls: replace(calls[0], via="model")))
def test_a_decoder_whose_arguments_have_other_names(how, call):
    torch.manual_seed(0)
    model = OwnNames().eval()
    sites = fastheads.find_sites(model)
    with how.attach(model) as hooks:
        try:
            call.run(model)
            results = hooks.get_results()
        except FastheadsError:
            return  # nothing that is known tells the tokens
    places = sequences(call.batch, call.seq, call.valid)
    made = [attention.made for attention in model.decoder.attentions]
    assert_sequences(results, sites, [[t for x in of_site for t in cut(x, places)] for of_site in made], how)


def sequence_first(self, hidden_states, *_, **__):
    """In place of Llama's attention: the projection takes `[seq, batch, width]`."""
    x = self.v_proj(hidden_states).unflatten(-1, (-1, 1, self.head_dim))
    x = x.expand(-1, -1, -1, self.num_key_value_groups, -1).flatten(2).cumsum(dim=1)
    made.append(x.detach().double())
    return self.o_proj(x.transpose(0, 1)).transpose(0, 1), None


made: list[torch.Tensor] = []


@settings(max_examples=60)
@example(how=Options(), batch=3, seq=3, where="class")
@example(how=Options(), batch=3, seq=3, where="instances, later")
@given(
    how=options(),
    batch=st.integers(1, 4),
    seq=st.integers(1, 4),
    where=st.sampled_from(["class", "instances", "instances, later"]),
)
def test_a_forward_in_place_of_the_attentions_own(how, batch, seq, where):
    model = small_llama()
    sites = fastheads.find_sites(model)
    attentions = [layer.self_attn for layer in model.model.layers]
    valid = tuple(tuple(int(t >= row) for t in range(seq)) for row in range(batch))
    made.clear()

    def patch():
        for attention in attentions:
            attention.forward = sequence_first.__get__(attention)

    with pytest.MonkeyPatch.context() as patches:
        if where == "class":
            patches.setattr(type(attentions[0]), "forward", sequence_first)
        elif where == "instances":
            patch()
        with how.attach(model) as hooks, torch.no_grad():
            if where == "instances, later":
                patch()
            try:
                model(input_ids=tokens(batch, seq), attention_mask=torch.tensor(valid))
            except FastheadsError:
                return
            results = hooks.get_results()
    places = sequences(batch, seq, valid)
    assert_sequences(results, sites, [cut(x, places) for x in made], how)
