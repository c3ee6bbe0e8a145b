"""The contract of the capture in one table: whether a forward counts after an event in each of its phases.

An event happens where a phase puts it: in IDLE before a forward, in BEGUN in the model's call before or after its decoder's, in
DECODING within the decoder's call, in TRACED between the graphs of a compiled decoder.
"""

from enum import Enum


class Phase(Enum):
    """The phase that a forward is in."""

    IDLE = "no forward is under way in this thread"
    BEGUN = "the model's call is under way, its decoder's is not"
    DECODING = "the decoder's call is under way in plain Python: inputs are kept or measured"
    TRACED = "the decoder's call is compiled: graphs measure"


class Event(Enum):
    """An event during a forward, or before it."""

    FINISH = "the call goes on and returns"
    FAILURE = "an exception leaves it"
    INTERRUPT = "Ctrl-C leaves it: torch calls no hook"
    PAUSED_CALL = "the model is called within paused()"
    RESET = "reset()"
    REMOVE = "remove()"
    RESULTS = "get_results()"
    NESTED_CALL = "the model is called again in this thread"
    SECOND_THREAD = "the model is called in another thread"
    COMPILED_CALL = "the model is called in this thread, compiled as a whole, the hooks of the call included"
    CAPTURE = "a call of the model is captured as a CUDA graph in this thread"


class Outcome(Enum):
    """What counts after the event."""

    COUNTS = "the forward counts, once"
    DROPPED = "the forward does not count"
    BOTH = "the forward counts, and so does the other one"
    REFUSED = "the other call raises ForwardError, and the forward counts"


_ALIKE = {
    Event.FINISH: Outcome.COUNTS,
    Event.FAILURE: Outcome.DROPPED,
    Event.INTERRUPT: Outcome.DROPPED,
    Event.PAUSED_CALL: Outcome.COUNTS,
    Event.RESET: Outcome.DROPPED,
    Event.REMOVE: Outcome.DROPPED,
    Event.RESULTS: Outcome.COUNTS,
    Event.NESTED_CALL: Outcome.BOTH,
    Event.SECOND_THREAD: Outcome.BOTH,
    # A graph reads and writes the committed moments by itself.
    Event.COMPILED_CALL: Outcome.REFUSED,
    Event.CAPTURE: Outcome.REFUSED,
}

# What becomes of the forward that is in that phase, or comes next (IDLE).
TABLE: dict[Phase, dict[Event, Outcome]] = {
    # An exception, an interrupt, a reset before it are nothing to the forward that comes.
    Phase.IDLE: dict.fromkeys(Event, Outcome.COUNTS)
    | dict.fromkeys(
        (Event.NESTED_CALL, Event.SECOND_THREAD, Event.COMPILED_CALL, Event.CAPTURE), Outcome.BOTH
    )
    | {Event.REMOVE: Outcome.DROPPED},
    Phase.BEGUN: _ALIKE,
    Phase.DECODING: _ALIKE,
    # Compiled code of one model runs in one forward at a time.
    Phase.TRACED: _ALIKE | {Event.NESTED_CALL: Outcome.REFUSED, Event.SECOND_THREAD: Outcome.REFUSED},
}
