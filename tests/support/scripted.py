"""Forwards by script: in threads that take turns, one inside another, that fail, are paused, and are interrupted by resets.

Beside the managers goes a book of what must have counted, kept by what really returned and raised.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from drawn import Options, Tally, assert_sequences, cut, sequences
from oracle import captured_inputs
from tiny_models import tokens

import fastheads
from fastheads.errors import FastheadsError

# (batch, seq, rows of 0 and 1); each shape has one mask for hooks.token_mask, of tokens that see some.
CALLS = [
    (2, 5, ((0, 0, 1, 1, 1), (1, 1, 1, 1, 1))),
    (2, 5, None),
    (1, 4, ((1, 0, 1, 1),)),
    (3, 3, ((1, 1, 0), (0, 0, 0), (1, 1, 1))),
    (4, 1, None),
]
TOLD = {
    (2, 5): ((0, 0, 1, 1, 0), (0, 0, 0, 1, 1)),
    (1, 4): ((0, 1, 1, 1),),
    (3, 3): ((0, 1, 1), (0, 0, 0), (1, 0, 0)),
    (4, 1): ((1,), (0,), (1,), (1,)),
}
DECODER_PLACES = ["decoder pre", "layer", "o_proj 0", "mlp", "o_proj 1", "behind o_proj 1", "decoder post"]
PLACES = ["model pre", *DECODER_PLACES, "lm_head", "model post"]


class Broken(Exception):
    """What a hook raises."""


class Interrupt(BaseException):
    """The same as Ctrl-C, of which torch tells no hook."""


@dataclass(frozen=True)
class Event:
    """What a hook at a place does, the first time that the forward comes there."""

    at: str
    kind: str  # raise, interrupt, nest, reset, results, attach, detach
    inner: "Step | None" = None


@dataclass(frozen=True)
class Step:
    """A forward."""

    call: int = 0  # of CALLS
    via: str = "model"
    paused: bool = False
    told: tuple[int, int] | None = None  # the shape whose mask is given to hooks.token_mask
    events: tuple[Event, ...] = ()
    catches: Any = Exception  # what its caller does not let pass
    hides: bool = False  # the model does not let its decoder's errors pass


@dataclass(eq=False)
class Book:
    """A manager, and what it must have counted: (call, shape of the mask that was told)."""

    hooks: Any
    how: Options
    epoch: int = 0
    attached: bool = True
    counted: list[tuple[int, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Record:
    """A forward under way."""

    step: Step
    outer: "Record | None"
    paused: bool
    told: tuple[int, int] | None
    begun: bool = False  # the managers know of it
    in_decoder: bool = False
    decoder_ended: bool = False
    tainted: bool = False  # the error of a decoder's call in it was hidden: it must be refused
    void: bool = False  # it never came to its decoder
    done: set[Event] = field(default_factory=set)
    epochs: dict[Book, int] = field(
        default_factory=dict
    )  # of the managers for which it is a forward of its own
    of_decoder: dict[Book, int] = field(default_factory=dict)  # for which its decoder's call is
    part_of: dict[Book, "Record"] = field(default_factory=dict)  # for which it is a part of another
    extras: list[tuple[Book, tuple[int, Any]]] = field(default_factory=list)  # what counts with it


class Turns:
    """Threads one of which runs at a time; where they may switch, `order` tells which goes on."""

    def __init__(self, order, parties):
        self._order, self._alive = cycle(order), list(range(parties))
        self._changed = threading.Condition()
        self._turn = self._next()

    def _next(self):
        return self._alive[next(self._order) % len(self._alive)]

    def _wait(self, me):
        assert self._changed.wait_for(lambda: self._turn == me, timeout=60)

    def enter(self, me):
        with self._changed:
            self._wait(me)

    def switch(self, me):
        with self._changed:
            self._turn = self._next()
            self._changed.notify_all()
            self._wait(me)

    def leave(self, me):
        with self._changed:
            self._alive.remove(me)
            if self._alive:
                self._turn = self._next()
                self._changed.notify_all()


class Here(threading.local):
    """Of one thread."""

    number = 0
    stack: list[Record] | None = None
    paused = False
    told: tuple[int, int] | None = None


class Model:
    """The model, its places, and what the oracle needs of each call."""

    def __init__(self, model):
        self.model = model
        layers = model.model.layers
        projections = [layer.self_attn.o_proj for layer in layers]
        self.sites = fastheads.find_sites(model)
        self.modules = [
            *(("model pre", model), ("decoder pre", model.model), ("layer", layers[0])),
            *(("o_proj 0", projections[0]), ("mlp", layers[0].mlp), ("o_proj 1", projections[1])),
            *(("behind o_proj 1", projections[1]), ("decoder post", model.model)),
            *(("lm_head", model.lm_head), ("model post", model)),
        ]
        self.arguments, self.captured = [], []
        for seed, (batch, seq, valid) in enumerate(CALLS):
            mask = None if valid is None else torch.tensor(valid)
            self.arguments.append(dict(input_ids=tokens(batch, seq, seed=seed), attention_mask=mask))
            with captured_inputs([site.module for site in self.sites]) as inputs, torch.no_grad():
                model(**self.arguments[-1])
            self.captured.append([x for (x,) in inputs])

    def check(self, book):
        """The manager's results are those of its book."""
        want = [[] for _ in self.sites]
        for call, told in book.counted:
            batch, seq, valid = CALLS[call]
            places = sequences(batch, seq, valid if told is None else TOLD[told])
            for of_site, x in zip(want, self.captured[call], strict=True):
                of_site += cut(x, places)
        assert_sequences(book.hooks.get_results(), self.sites, want, book.how)


class Script:
    """Runs the steps of each thread, and keeps the books."""

    def __init__(self, of: Model, how: Options, second: Options, late: bool, tally: Tally) -> None:
        """`late`: the hooks that do what the steps say are registered after the manager's."""
        self._of, self._late, self._tally = of, late, tally
        self._second = second
        self._here = Here()
        self._turns: Turns | None = None
        self._ordered: set[str] = set()  # places whose hooks come before the managers'
        self._refused: list[FastheadsError] = []
        self._handles: list[Any] = []
        self._how = how

    def run(self, programs, order):
        """`programs`: the steps of each thread. Checks every manager's results at the end."""
        if not self._late:
            self._register()
        self._first = Book(self._how.attach(self._of.model), self._how)
        self._books = [self._first]
        try:
            if self._late:
                self._register()
            if any(step.hides for program in programs for step in _all(program)):
                self._hide()
            if len(programs) == 1:
                self._thread(0, programs[0])
            else:
                self._turns = Turns(order, len(programs))
                with ThreadPoolExecutor(len(programs)) as pool:
                    running = [pool.submit(self._thread, *each) for each in enumerate(programs)]
                    for future in running:
                        future.result(timeout=120)
            for book in self._books:
                self._of.check(book)
        finally:
            for handle in self._handles:
                handle.remove()
            vars(self._of.model).pop("forward", None)
            for book in self._books:
                book.hooks.remove()

    def _register(self):
        for place, module in self._of.modules:
            behind = place.startswith("behind") or place.endswith("post")
            register = module.register_forward_hook if behind else module.register_forward_pre_hook
            self._handles.append(register(partial(self._passed, place)))

    def _hide(self):
        model, forward = self._of.model, self._of.model.forward

        def hiding(**arguments):
            record = self._here.stack[-1]
            if not record.step.hides:
                return forward(**arguments)
            try:
                return forward(**arguments)
            except Exception:
                record.tainted = record.tainted or record.in_decoder
                record.void = not record.decoder_ended
                return None

        model.forward = hiding

    def _thread(self, number, program):
        here = self._here
        here.number, here.stack = number, []
        if self._turns is not None:
            self._turns.enter(number)
        try:
            with torch.no_grad():
                for step in program:
                    if isinstance(step, Event):
                        self._happens(step)
                    else:
                        with suppress(Broken, Interrupt, FastheadsError):
                            self._forward(step)
        finally:
            if self._turns is not None:
                self._turns.leave(number)

    def _forward(self, step):
        here = self._here
        paused, told = here.paused, here.told
        here.paused = paused or step.paused
        here.told = told if step.told is None else step.told
        record = Record(step, here.stack[-1] if here.stack else None, here.paused, here.told)
        here.stack.append(record)
        fits = here.told in (None, CALLS[step.call][:2]) or here.paused
        module = self._of.model if step.via == "model" else self._of.model.model
        try:
            with ExitStack() as contexts:
                if step.paused:
                    contexts.enter_context(self._first.hooks.paused())
                if step.told is not None:
                    mask = torch.tensor(TOLD[step.told]).bool()
                    contexts.enter_context(self._first.hooks.token_mask(mask))
                module(**self._of.arguments[step.call])
        except BaseException as error:
            if record.in_decoder:
                for root in record.part_of.values():
                    root.tainted = True
            if isinstance(error, FastheadsError) and not any(error is known for known in self._refused):
                tainted = any(each.tainted for each in here.stack)
                assert tainted or not fits, "refused without a reason"
                self._ordered.add("decoder pre")  # the manager's hook there ran, ours perhaps not
                self._refused.append(error)
                self._tally["refused"] += 1
            else:
                self._tally["failed"] += 1
            raise
        else:
            assert record.paused or not record.tainted
            assert fits or record.void
            self._tally["paused" if record.paused else "measured"] += 1
            self._ended(record)
        finally:
            here.stack.pop()
            here.paused, here.told = paused, told

    def _counts(self, book, record, epoch):
        """True if the forward, begun in that epoch, counts now."""
        return book.attached and book.epoch == epoch and not (record.paused and book is self._first)

    def _entry(self, book, record):
        return record.step.call, record.told if book is self._first else None

    def _ended(self, record):
        for book, epoch in record.epochs.items():
            if self._counts(book, record, epoch):
                if not record.void:
                    book.counted.append(self._entry(book, record))
                book.counted += [entry for of, entry in record.extras if of is book]
        for book, root in record.part_of.items():
            root.extras.append((book, self._entry(book, record)))

    def _root(self, book, record):
        """The forward of the manager that a call of the decoder belongs to; None where it is one of its own."""
        while record is not None:
            if record.in_decoder:
                return None
            if record.begun and record.step.via == "model" and book in record.epochs:
                return record
            if book in record.part_of:
                return record.part_of[book]
            record = record.outer
        return None

    def _begin(self, record):
        record.begun = True
        for book in self._books:
            if not book.attached:
                continue
            root = self._root(book, record.outer) if record.step.via == "decoder" else None
            if root is None or (record.paused and book is self._first):
                record.epochs[book] = book.epoch
            else:
                record.part_of[book] = root

    def _enter_decoder(self, record):
        record.in_decoder = True
        for book in self._books:
            if book.attached and book not in record.epochs and book not in record.part_of:
                record.of_decoder[book] = book.epoch

    def _leave_decoder(self, record):
        record.in_decoder, record.decoder_ended = False, True
        for book, epoch in record.of_decoder.items():
            if self._counts(book, record, epoch):
                book.counted.append(self._entry(book, record))

    def _passed(self, place, *_):
        """A hook of one of the model's modules."""
        if not self._here.stack:
            return
        record = self._here.stack[-1]
        opens, enters = place == f"{record.step.via} pre", place == "decoder pre"
        behind_ours = self._late and place not in self._ordered
        self._ordered.add(place)
        if opens and behind_ours:
            self._begin(record)
        if enters and behind_ours:
            self._enter_decoder(record)
        if self._turns is not None:
            self._turns.switch(self._here.number)
        for event in record.step.events:
            if event.at == place and event not in record.done:
                record.done.add(event)
                self._happens(event)
        if opens and not record.begun:
            self._begin(record)
        if enters and not record.in_decoder:
            self._enter_decoder(record)
        if place == "decoder post":
            self._leave_decoder(record)

    def _happens(self, event):
        if event.kind == "raise":
            raise Broken
        if event.kind == "interrupt":
            raise Interrupt
        if event.kind == "nest":
            try:
                self._forward(event.inner)
            except event.inner.catches as error:
                if not isinstance(error, (Broken, Interrupt, FastheadsError)):
                    raise
        elif event.kind == "reset":
            self._first.hooks.reset()
            self._first.epoch += 1
            self._first.counted.clear()
        elif event.kind == "results":
            self._of.check(self._first)
        elif event.kind == "attach":
            if len(self._books) < 3:
                self._books.append(Book(self._second.attach(self._of.model), self._second))
        elif event.kind == "detach":
            for book in self._books[1:]:
                book.hooks.remove()
                book.attached = False


def _all(program) -> Iterator[Step]:
    """The steps, and those inside them."""
    for step in program:
        if isinstance(step, Event):
            step = step.inner
            if step is None:
                continue
        yield step
        yield from _all(step.events)
