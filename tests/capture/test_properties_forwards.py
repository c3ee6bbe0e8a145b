"""Forwards in threads, inside one another, paused, failing, interrupted by resets: what ended normally counts, and nothing else.

Threads take turns at each hook, in an order that is drawn, so that what fails does so each time.
"""

import pytest
from drawn import Options, Tally, examples, options, small_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import CALLS, DECODER_PLACES, PLACES, TOLD, Broken, Event, Model, Script, Step


@st.composite
def steps(draw, depth=0):
    via = draw(st.sampled_from(["model", "model", "decoder"]))
    kinds = ["raise", "interrupt", "reset", "results", "attach", "detach"]
    if depth < 2:
        kinds += ["nest"] * 6
    events = []
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        kind = draw(st.sampled_from(kinds))
        at = draw(st.sampled_from(PLACES if via == "model" else DECODER_PLACES))
        events.append(Event(at, kind, draw(steps(depth + 1)) if kind == "nest" else None))
    call = draw(st.integers(0, len(CALLS) - 1))
    told = None
    if draw(st.integers(0, 3)) == 3:
        told = draw(st.sampled_from([CALLS[call][:2]] * 5 + list(TOLD)))
    return Step(
        call,
        via,
        paused=draw(st.integers(0, 7)) == 7,
        told=told,
        events=tuple(events),
        catches=draw(st.sampled_from([Exception, Exception, Broken, ()])),
        hides=via == "model" and draw(st.integers(0, 3)) == 3,
    )


def programs():
    between = st.builds(Event, at=st.just(""), kind=st.sampled_from(["reset", "results", "attach", "detach"]))
    program = st.lists(st.one_of(steps(), steps(), steps(), between), min_size=1, max_size=3)
    return st.lists(program, min_size=1, max_size=3)


# A hook calls the model inside itself, and catches what breaks that call off.
BROKEN_OFF = Step(events=(Event("o_proj 1", "interrupt"),), catches=BaseException)


@pytest.fixture(scope="module")
def of():
    return Model(small_llama())


@examples("forwards")
def test_what_ends_normally_counts_and_nothing_else(of, number):
    tally = Tally()

    @settings(max_examples=number)
    @example(
        how=Options(),
        second=Options(),
        late=False,
        programs=[[Step(events=(Event("layer", "nest", BROKEN_OFF),))]],
        order=[0],
    )
    @given(
        how=options(),
        second=options(),
        late=st.booleans(),
        programs=programs(),
        order=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    )
    def holds(how, second, late, programs, order):
        tally["examples"] += 1
        Script(of, how, second, late, tally).run(programs, order)

    holds()
    tally.check(number, measured=0.5, refused=0.01, failed=0.05, paused=0.03)
