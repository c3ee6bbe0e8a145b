"""Every event in every phase of a forward: what counts is what the table says, by the oracle."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.capture.phases import TABLE, Event, Outcome, Phase
from fastheads.errors import ForwardError

IDS = [tokens(2, 6, seed=i) for i in range(2)]  # of the forward, and of the other one
CAPTURED = pytest.param(
    Event.CAPTURE,
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)
EVENTS = [CAPTURED if event is Event.CAPTURE else event for event in Event]


class Moment:
    """Calls a function once, in a phase of the next forward of the model in this thread."""

    def __init__(self, model, phase, act):
        self._act, self._thread = act, threading.get_ident()
        at = {Phase.BEGUN: model.lm_head, Phase.DECODING: model.model.layers[1].mlp}
        at[Phase.TRACED] = model.model.layers[1].mlp
        self._handle = at[phase].register_forward_pre_hook(self._now)

    @torch.compiler.disable
    def _now(self, *_):
        act, self._act = self._act, None
        if act is not None and threading.get_ident() == self._thread:
            act()

    def remove(self):
        self._handle.remove()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
def test_what_counts_is_what_the_table_says(phase, event):
    torch._dynamo.reset()
    outcome = TABLE[phase][event]
    device = "cuda" if event is Event.CAPTURE else "cpu"
    model = build().to(device)
    ids = [each.to(device) for each in IDS]
    hooks = fastheads.HookManager(model, "all", allow_skipped=False)
    refused = []

    def call(**arguments):  # around the hooks of the call, so that the graph holds them
        return model(**arguments)

    whole = torch.compile(call, backend="eager")

    def call_other(called=model):
        with torch.no_grad():
            try:
                called(input_ids=ids[1], use_cache=False)
            except Exception as error:  # Dynamo may wrap it
                if not isinstance(error, ForwardError) and "profil" not in str(error):
                    raise
                refused.append(error)

    def capture():
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            # Where the call is refused, nothing is captured.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            with torch.cuda.graph(graph):
                call_other()
        if not refused:
            graph.replay()

    def raise_error(error):
        raise error

    def act():
        match event:
            case Event.FINISH:
                pass
            case Event.FAILURE:
                raise_error(ZeroDivisionError())
            case Event.INTERRUPT:
                raise_error(KeyboardInterrupt())
            case Event.PAUSED_CALL:
                with hooks.paused():
                    call_other()
            case Event.RESET:
                hooks.reset()
            case Event.REMOVE:
                hooks.remove()
            case Event.RESULTS:
                hooks.to_profile()
            case Event.NESTED_CALL:
                call_other()
            case Event.SECOND_THREAD:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(call_other).result(timeout=60)
            case Event.COMPILED_CALL:
                call_other(whole)
            case Event.CAPTURE:
                capture()

    if phase is Phase.TRACED:
        model.model.compile(backend="eager")
    moment = None if phase is Phase.IDLE else Moment(model, phase, act)
    try:
        with torch.no_grad():
            if phase is Phase.IDLE:
                with_error(act, event)
                model(input_ids=ids[0], use_cache=False)
            else:
                with_error(lambda: model(input_ids=ids[0], use_cache=False), event)
    finally:
        if moment is not None:
            moment.remove()
        model.model._compiled_call_impl = None
    counted = {
        Outcome.COUNTS: [0],
        Outcome.DROPPED: [],
        Outcome.BOTH: [0, 1],
        Outcome.REFUSED: [0],
    }[outcome]
    assert bool(refused) == (outcome is Outcome.REFUSED)
    # And the next forward counts.
    if event is not Event.REMOVE:
        with torch.no_grad():
            model(input_ids=ids[1], use_cache=False)
        counted = [*counted, 1]
    results = hooks.to_profile().results()
    hooks.remove()
    torch._dynamo.reset()
    sites = fastheads.find_sites(model)
    if not counted:
        assert not results["head_output_norm"]["count"].any()
        return
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        for which in counted:
            model(input_ids=ids[which], use_cache=False)
    assert_results(results, sites, inputs, [None] * len(counted), "all", 2e-5)


def with_error(call, event):
    error = {Event.FAILURE: ZeroDivisionError, Event.INTERRUPT: KeyboardInterrupt}.get(event)
    if error is None:
        call()
    else:
        with pytest.raises(error):
            call()
