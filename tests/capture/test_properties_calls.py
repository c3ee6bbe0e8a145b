"""Arguments of any form, however they are given: the moments equal the oracle, or a FastheadsError says why not."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from drawn import (
    EXAMPLES,
    Options,
    Tally,
    assert_sequences,
    bits,
    cut,
    examples,
    options,
    sequences,
    small_llama,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import captured_inputs
from tiny_models import tokens
from transformers import DynamicCache

import fastheads
from fastheads.errors import FastheadsError

ORDER = ("input_ids", "attention_mask", "position_ids", "past_key_values")
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
DTYPES = {"int": torch.long, "bool": torch.bool, "float": torch.float32}


@dataclass(frozen=True)
class Call:
    """One or two steps over a cache; `valid`, `told` are rows of 0 and 1."""

    batch: int
    steps: tuple[int, ...]  # tokens of each
    seed: int = 0
    mask: str = "none"  # or: 2d, 4d, additive, short, 3d, whole numbers
    valid: tuple[tuple[int, ...], ...] | None = None
    dtype: str = "int"  # of a 2D mask
    past_the_end: int = 0  # columns of a 2D mask for tokens to come
    one_for_all: bool = False  # a 4D mask, or positions, of one row
    low: float = -1e9  # what an additive mask forbids with
    bias: float = 0.0
    positions: bool = False  # beside the mask
    packed: str = "no"  # or: positions, cu
    bounds: tuple[int, ...] | None = None
    told: tuple[tuple[int, ...], ...] | None = None  # by hooks.token_mask
    told_by: str = "tensor"
    embeds: bool = False
    via: str = "model"
    positional: int = 0
    mode: str = "no_grad"

    @property
    def must_be_refused(self):
        """True where nothing tells the valid tokens."""
        tokens_of_call = self.batch * self.steps[0]
        wrong_bounds = self.packed == "cu" and self.bounds[-1] > tokens_of_call
        return wrong_bounds or (self.told is None and self.mask in ("short", "3d", "whole numbers"))

    def arguments(self, step, cache, embed):
        """By name, of one step."""
        past, now = sum(self.steps[:step]), self.steps[step]
        stop = past + now
        ids = tokens(self.batch, sum(self.steps), seed=self.seed)[:, past:stop]
        found = {"inputs_embeds": embed(ids)} if self.embeds else {"input_ids": ids}
        if self.mask != "none":
            found["attention_mask"] = self._mask(past, stop)
        if self.packed == "positions":
            rows = torch.tensor(self.position_rows())
            found["position_ids"] = rows[:1] if self.one_for_all else rows
        elif self.positions:
            rows = torch.tensor(self.valid or [[1] * stop] * self.batch)[:, :stop]
            found["position_ids"] = (rows.cumsum(1) - 1).clamp(min=0)[:, past:]
        if self.packed == "cu":
            found["cu_seq_lens_q"] = torch.tensor(self.bounds, dtype=torch.int32)
        if cache is not None:
            found["past_key_values"] = cache
        return found

    def position_rows(self):
        """Positions that start again with each sequence, and with each row."""
        seq = self.steps[0]
        rows, position = [], 0
        for token in range(self.batch * seq):
            position = 0 if token in self.bounds or token % seq == 0 else position + 1
            if token % seq == 0:
                rows.append([])
            rows[-1].append(position)
        return rows

    def _mask(self, past, stop):
        now = stop - past
        if self.mask == "short":
            return torch.ones(self.batch, stop - 1)
        if self.mask == "3d":
            return torch.ones(self.batch, 1, stop)
        rows = torch.tensor(self.valid)[:, :stop]
        if self.mask == "2d":
            rows = torch.cat([rows, torch.ones(self.batch, self.past_the_end, dtype=torch.long)], dim=1)
            return rows.to(DTYPES[self.dtype])
        square = torch.ones(stop, stop).tril().bool()[past:] & rows.bool()[:, None, None, :]
        assert square.shape == (self.batch, 1, now, stop)
        square = square[:1] if self.one_for_all else square
        if self.mask == "additive":
            return torch.where(square, self.bias, self.low)
        return square.long() if self.mask == "whole numbers" else square

    def sequences(self, step):
        """What the step's arguments say, and `told` in place of the mask."""
        past, now = sum(self.steps[:step]), self.steps[step]
        valid = self.told if self.told is not None else self.valid if self.mask != "none" else None
        if valid is not None:
            if self.told is None and self.one_for_all:
                valid = valid[:1] * self.batch
            valid = [row[past : past + now] for row in valid]
        bounds = self.bounds
        if self.packed == "positions":
            bounds = sorted({*bounds, *range(0, self.batch * now + 1, now)})
        return sequences(self.batch, now, valid, bounds)


@st.composite
def calls(draw):
    batch = draw(st.integers(1, 4))
    steps = (draw(st.integers(1, 7)),)
    packed = draw(st.sampled_from(["no", "no", "no", "positions", "cu"]))
    if packed == "no" and draw(st.booleans()):
        steps += (draw(st.integers(1, 4)),)
    seq = sum(steps)
    kinds = ["none", "2d", "2d", "4d", "additive"]
    if draw(st.integers(0, 11)) == 11 and seq > 1 and len(steps) == 1:
        # Beside cu_seq_lens_q, a mask of another form keeps the sequences apart.
        kinds = ["short", "whole numbers"] if packed == "cu" else ["short", "3d", "whole numbers"]
    mask = "none" if packed == "positions" else draw(st.sampled_from(kinds))
    bounds = None
    if packed == "cu":
        most = batch * seq + draw(st.sampled_from([0, 0, 0, 0, 0, 1]))
        bounds = tuple(sorted(draw(st.lists(st.integers(0, most), min_size=2, max_size=6))))
    one_for_all = draw(st.booleans()) and mask in ("none", "4d", "additive")
    if packed == "positions":
        within = draw(st.sets(st.integers(1, max(seq - 1, 1)), max_size=3))
        rows = range(batch) if one_for_all else draw(st.sets(st.integers(0, batch - 1)))
        bounds = tuple(sorted(row * seq + n for row in rows for n in within if n < seq))
    told = draw(st.none() | bits(batch, seq)) if draw(st.booleans()) else None
    if told is not None and mask in ("short", "3d", "whole numbers"):
        told = None  # the model itself does not take them
    return Call(
        batch,
        steps,
        seed=draw(st.integers(0, 99)),
        mask=mask,
        valid=None if mask in ("none", "short", "3d") else draw(bits(batch, seq)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        past_the_end=draw(st.sampled_from([0, 0, 2])) if mask == "2d" else 0,
        one_for_all=one_for_all,
        low=draw(st.sampled_from([-1e9, -1e4, torch.finfo(torch.float32).min])),
        bias=draw(st.sampled_from([0.0, -0.3, 3.0])),
        positions=packed == "no" and (mask == "2d" or draw(st.booleans())),
        packed=packed,
        bounds=bounds,
        told=told,
        told_by=draw(st.sampled_from(["tensor", "function"])),
        embeds=draw(st.sampled_from([False, False, False, True])),
        via=draw(st.sampled_from(["model", "decoder"])),
        positional=draw(st.integers(0, 4)),
        mode=draw(st.sampled_from(list(MODES))),
    )


def bare(forward):
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def one_name(forward):
    def wrapper(input_ids=None, *args, **kwargs):
        return forward(input_ids, *args, **kwargs)

    return wrapper


def swapped(forward):
    def wrapper(attention_mask=None, input_ids=None, *args, **kwargs):
        return forward(input_ids, attention_mask, *args, **kwargs)

    return wrapper


def other_names(forward):
    def wrapper(ids=None, mask=None, **kwargs):
        return forward(ids, mask, **kwargs)

    return wrapper


WRAPPERS = {
    "none": None,
    "wraps": lambda forward: functools.wraps(forward)(bare(forward)),
    "bare": bare,
    "one name": one_name,
    "swapped": swapped,
    "other names": other_names,  # in examples alone
}
PADDED = Call(2, (5,), mask="2d", valid=((0, 0, 1, 1, 1), (1, 1, 1, 1, 1)), via="decoder", positional=2)
# How many positional arguments have a name.
NAMED = {"bare": 0, "other names": 0, "one name": 1, "swapped": 2}


def positional_part(by_name, number):
    """The arguments as (args, kwargs), the first `number` of them without names."""
    args, left = [], dict(by_name)
    for name in ORDER[:number]:
        args.append(left.pop(name, None))
    while args and args[-1] is None:
        args.pop()
    return args, left


@pytest.fixture(scope="module")
def model():
    return small_llama()


def run(model, hooks, call, inputs, wrapper, tally):
    """Run the steps of a call; the sequences that they give each site. `inputs`: those that are captured meanwhile."""
    module = model if call.via == "model" else model.model
    cache = DynamicCache(config=model.config) if len(call.steps) > 1 else None
    found = [[] for _ in inputs]
    for step in range(len(call.steps)):
        for captured in inputs:
            captured.clear()
        with MODES[call.mode]():
            by_name = call.arguments(step, cache, model.get_input_embeddings())
            args, kwargs = positional_part(by_name, call.positional)
            if wrapper == "swapped" and call.via == "decoder" and args:
                mask = args[1] if len(args) > 1 else kwargs.pop("attention_mask", None)
                args = [mask, args[0], *args[2:]]
            told = nullcontext()
            if call.told is not None:
                past = sum(call.steps[:step])
                mask = torch.tensor([row[past : past + call.steps[step]] for row in call.told]).bool()
                told = hooks.token_mask(mask if call.told_by == "tensor" else lambda given, mask=mask: mask)
            unnamed = call.via == "decoder" and len(args) > NAMED.get(wrapper, 9)
            try:
                with told:
                    module(*args, **kwargs)
            except FastheadsError:
                assert unnamed or call.must_be_refused, "refused without a reason"
                tally["refused"] += 1
                return found
        assert not call.must_be_refused
        tally["measured"] += 1
        places = call.sequences(step)
        for of_site, captured in zip(found, inputs, strict=True):
            (x,) = captured
            of_site += cut(x, places)
    return found


# Tokens that a mask hides and token_mask() names have heads of zeros: the oracle counts their relative samples as nonfinite too.
@pytest.mark.filterwarnings("ignore:.*samples were NaN or infinite:RuntimeWarning")
@examples("calls")
def test_arguments_of_any_form(model, number):
    tally = Tally()
    sites = fastheads.find_sites(model)

    @settings(max_examples=number)
    @example(how=Options("token"), drawn=[PADDED], wrapper="other names", late=False)
    @given(
        how=options(),
        drawn=st.lists(calls(), min_size=1, max_size=3),
        wrapper=st.sampled_from([name for name in WRAPPERS if name != "other names"]),
        late=st.booleans(),
    )
    def holds(how, drawn, wrapper, late):
        tally["examples"] += 1
        decoder = model.model

        def wrap():
            if WRAPPERS[wrapper] is not None:
                decoder.forward = WRAPPERS[wrapper](decoder.forward)

        try:
            if not late:
                wrap()
            with captured_inputs([site.module for site in sites]) as inputs, how.attach(model) as hooks:
                if late:
                    wrap()
                want = [[] for _ in sites]
                for call in drawn:
                    for of_site, more in zip(
                        want, run(model, hooks, call, inputs, wrapper, tally), strict=True
                    ):
                        of_site += more
                assert_sequences(hooks.get_results(), sites, want, how)
        finally:
            vars(decoder).pop("forward", None)

    holds()
    tally.check(number, measured=0.6, refused=0.02)


def test_there_are_enough_examples():
    assert sum(EXAMPLES.values()) >= 2000
