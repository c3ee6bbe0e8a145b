"""Several forwards of one model under way: in threads, one inside another, beside the hooks of others."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.capture.collect import load_state, state
from fastheads.capture.manager import recorder_of
from fastheads.errors import ForwardError
from fastheads.stats.state import CommittedState

RTOL = 2e-5
MASKS = [
    torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
    torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
    None,
]


def batches(seed=0):
    """Three of each thread: other tokens, other padding."""
    return [
        dict(input_ids=tokens(2, 6, seed=10 * seed + i), attention_mask=MASKS[(seed + i) % 3])
        for i in range(3)
    ]


def check(results, model, calls, token_agg, **options):
    """The results are those of the oracle over exactly these calls."""
    sites = fastheads.find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        for call in calls:
            model(**call)
    masks = [None if (mask := call.get("attention_mask")) is None else mask.tolist() for call in calls]
    assert_results(results, sites, inputs, masks, token_agg, RTOL, **options)


def counts(hooks):
    return hooks.get_results()["head_output_norm"]["count"][:, 0].tolist()


class Meeting:
    """A hook in which threads wait for one another, so that their forwards overlap for certain."""

    def __init__(self, model, parties):
        self._barrier = threading.Barrier(parties)
        self._handle = model.model.layers[1].mlp.register_forward_pre_hook(self._meet)

    def _meet(self, *_):
        self._barrier.wait(timeout=30)

    def __enter__(self):
        pass

    def __exit__(self, *error):
        self._handle.remove()
        self._barrier.abort()


def during_forward(model, run, act):
    """Call `run`, which calls the model in another thread, and `act` while that forward is held in its second layer."""
    under_way, over = threading.Event(), threading.Event()

    def hold(*_):
        under_way.set()
        over.wait(timeout=60)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(hold)
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run)
            try:
                assert under_way.wait(timeout=60)
                return act()
            finally:
                over.set()
                future.result(timeout=60)
    finally:
        handle.remove()


def in_threads(functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(f) for f in functions]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("backend", ["factored", "einsum"])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("group_bytes", [0, 2**26])
def test_forwards_in_two_threads_at_once_count_each_under_its_own_mask(
    family, backend, token_agg, group_bytes
):
    model = build(family)

    def run(seed):
        with torch.no_grad():
            for call in batches(seed):
                model(**call)

    with fastheads.HookManager(model, token_agg, backend=backend, group_bytes=group_bytes) as hooks:
        with Meeting(model, 2):
            in_threads([lambda: run(0), lambda: run(1)])
        results = hooks.get_results()
    check(results, model, batches(0) + batches(1), token_agg)


def test_many_threads_that_never_meet_by_arrangement():
    model = build()
    with fastheads.HookManager(model, "all") as hooks:

        def run(seed):
            with torch.inference_mode() if seed % 2 else torch.no_grad():
                for call in batches(seed):
                    model(**call)

        in_threads([lambda seed=seed: run(seed) for seed in range(8)])
        results = hooks.get_results()
    check(results, model, [call for seed in range(8) for call in batches(seed)], "all")


def test_results_while_a_forward_runs_in_another_thread_hold_those_that_ended():
    model = build()
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(**batches(0)[0])

        def run():
            with torch.no_grad():
                model(**batches(0)[1])

        seen = during_forward(model, run, lambda: counts(hooks))
        assert seen == [2] * 3
        check(hooks.get_results(), model, batches(0)[:2], "all")


def test_contexts_are_for_the_thread_that_enters_them():
    model = build()
    ids = [tokens(2, 6, seed=i) for i in range(2)]
    masks = [mask.bool() for mask in MASKS[:2]]
    with fastheads.HookManager(model, "all") as hooks:

        def masked(i):
            with torch.no_grad(), hooks.token_mask(masks[i]):
                model(input_ids=ids[i])

        def warm_up():
            with torch.no_grad(), hooks.paused():
                model(input_ids=ids[0])

        with Meeting(model, 3):
            in_threads([lambda: masked(0), lambda: masked(1), warm_up])
        results = hooks.get_results()
    sites = fastheads.find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        for each in ids:
            model(input_ids=each)
    assert_results(results, sites, inputs, [mask.tolist() for mask in masks], "all", RTOL)


@pytest.mark.parametrize("outermost", ["model", "decoder"])
def test_a_forward_inside_a_forward_counts_as_one_of_its_own(outermost):
    model = build()
    calls = [dict(input_ids=tokens(2, 6, seed=i), attention_mask=MASKS[i]) for i in range(2)]
    called = model if outermost == "model" else model.model

    def inside(module, args):
        if not busy:
            busy.append(1)
            called(**calls[1])

    for at in (model.model.layers[0].mlp, model.model.layers[2].self_attn.o_proj, model.lm_head):
        busy: list[int] = []
        with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
            handle = at.register_forward_pre_hook(inside)
            model(**calls[0])
            handle.remove()
            results = hooks.get_results()
        check(results, model, calls, "all")


def test_a_forward_inside_a_forward_that_fails_takes_only_itself_away():
    model = build()
    calls = [dict(input_ids=tokens(2, 6, seed=i), attention_mask=MASKS[i]) for i in range(2)]
    depth = []

    def inside(module, args):
        depth.append(1)
        if len(depth) == 1:
            with pytest.raises(ZeroDivisionError):
                model(**calls[1])
        elif len(depth) == 2:
            raise ZeroDivisionError

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(inside)
        model(**calls[0])
        handle.remove()
        results = hooks.get_results()
    check(results, model, calls[:1], "all")


@pytest.mark.parametrize("outermost", ["model", "decoder"])
def test_a_paused_forward_inside_a_forward_is_not_taken_for_its_layers(outermost):
    model = build()
    calls = [dict(input_ids=tokens(2, 6, seed=i), attention_mask=MASKS[i]) for i in range(2)]
    called = model if outermost == "model" else model.model
    busy = []

    def inside(module, args):
        if not busy:
            busy.append(1)
            with hooks.paused():
                called(**calls[1])

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(inside)
        model(**calls[0])
        handle.remove()
        results = hooks.get_results()
    check(results, model, calls[:1], "all")


@pytest.mark.parametrize("outermost", ["model", "decoder"])
@pytest.mark.parametrize("when", ["after attaching", "during the forward"])
def test_a_forward_whose_last_hook_fails_does_not_count(outermost, when):
    model = build()
    module = model if outermost == "model" else model.model
    handles = []

    def fail(*_):
        raise ZeroDivisionError

    def register(*_):
        handles.append(module.register_forward_hook(fail))

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        if when == "after attaching":
            register()
        else:
            handles.append(model.model.layers[0].register_forward_pre_hook(register))
        # A hook that comes during the forward is not called in it, or makes it fail.
        with pytest.raises((ZeroDivisionError, ForwardError)):
            module(input_ids=tokens(2, 6))
        for handle in handles:
            handle.remove()
        assert counts(hooks) == [0] * 3
        module(input_ids=tokens(2, 6))
        assert counts(hooks) == [2] * 3


def test_an_argument_that_a_later_hook_changes_is_not_overlooked():
    """The forward in which the hook is new is refused; the next ones see what it made."""
    model = build()
    call = dict(input_ids=tokens(2, 6), attention_mask=MASKS[0])

    def other_mask(module, args, kwargs):
        return args, kwargs | {"attention_mask": MASKS[1]}

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        handle = model.model.register_forward_pre_hook(other_mask, with_kwargs=True)
        with pytest.raises(ForwardError, match="pre-hook"):
            model(**call)
        assert counts(hooks) == [0] * 3
        model(**call)
        results = hooks.get_results()
        handle.remove()
    check(results, model, [call | {"attention_mask": MASKS[1]}], "all")


def test_a_hook_that_comes_later_and_changes_nothing_is_no_error():
    model = build()
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model.model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
        model.register_forward_hook(lambda *_: None)
        for call in batches(0):
            model(**call)
        check(hooks.get_results(), model, batches(0), "all")


def test_a_forward_that_one_manager_refuses_counts_for_none():
    """Two managers on one model: the error of the second comes when the first has measured."""
    model = build()
    weight = model.model.layers[0].self_attn.o_proj.weight
    reading = fastheads.HookManager(model, "all", backend="einsum")
    keeping = fastheads.HookManager(model, "all", backend="factored")
    with reading, keeping, torch.no_grad():
        handle = model.lm_head.register_forward_pre_hook(lambda *_: (weight.mul_(2), None)[1])
        with pytest.raises(fastheads.StaleFactorError):
            model(**batches(0)[0])
        handle.remove()
        assert counts(reading) == [0] * 3
        model(**batches(0)[0])
        results = reading.get_results(), keeping.get_results()
    for each in results:
        check(each, model, batches(0)[:1], "all")


@pytest.mark.parametrize("what", ["reset", "remove"])
def test_a_forward_that_began_before_a_reset_does_not_count(what):
    model = build()
    hooks = fastheads.HookManager(model, "all")
    with torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: getattr(hooks, what)())
        model(**batches(0)[0])
        handle.remove()
        assert counts_of_nothing(hooks) == [0] * 3
    hooks.remove()


def counts_of_nothing(hooks):
    return hooks.to_profile().moments["head_output_norm"].count[:, 0].tolist()


def test_a_forward_of_a_thread_that_was_broken_off_is_no_forward_under_way():
    """Torch calls no hook after an interrupt: the thread is gone, or goes on with something else. A forward that was compiled as
    a whole is refused while another one is under way.
    """
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(called(model), backend="eager")
    calls = batches(0)

    def interrupted(*_):
        raise KeyboardInterrupt

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupted)

        def run():
            with torch.no_grad(), pytest.raises(KeyboardInterrupt):
                model(**calls[0])

        in_threads([run])
        run()
        handle.remove()
        compiled(**calls[0])
        in_threads([lambda: torch.no_grad()(model)(**calls[1])])
        model(**calls[2])
        check(hooks.get_results(), model, calls, "all")
    torch._dynamo.reset()


def test_a_decoder_whose_error_the_model_hides_is_an_error():
    model = build()
    forward = model.model.forward

    def decoder(*args, **kwargs):
        forward(*args, **kwargs)
        raise ZeroDivisionError

    def hiding(input_ids):
        try:
            model.model(input_ids=input_ids)
        except ZeroDivisionError:
            return None

    model.model.forward, model.forward = decoder, hiding
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        with pytest.raises(ForwardError, match="did not end"):
            model(tokens(2, 6))
        assert counts_of_nothing(hooks) == [0] * 3


def test_the_settings_of_products_survive_threads():
    """They are the process's: one thread must not put back what another one had set for a moment."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    from fastheads.stats.numerics import exact_arithmetic

    first, second = threading.Event(), threading.Event()

    def outer():
        with exact_arithmetic("cpu"):
            first.set()
            second.wait(timeout=30)

    def inner():
        first.wait(timeout=30)
        with exact_arithmetic("cpu"):
            second.set()
            futures[0].result(timeout=30)
            assert matmul.fp32_precision == "ieee"

    try:
        matmul.fp32_precision = "tf32"
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(outer)]
            futures.append(pool.submit(inner))
            for future in futures:
                future.result(timeout=60)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def called(model):
    """A function around the whole call, the model's own hooks included."""

    def call(**arguments):
        return model(**arguments)

    return call


def compiled_per_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@torch.library.custom_op("fastheads_tests::held", mutates_args=())
def held(x: torch.Tensor) -> torch.Tensor:
    """Where compiled code runs it, call what `Held.then` is set to."""
    Held.then()
    return x.clone()


held.register_fake(torch.empty_like)


class Held(torch.nn.Module):
    """A module that the user put into the model: it lets a test act in the middle of compiled code."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    @staticmethod
    def then():
        pass

    def forward(self, x):
        return self.module(held(x))


def hold(model, where):
    """Within the decoder's call, before what it kept is measured, or behind it."""
    if where == "decoder":
        model.model.layers[1].mlp = Held(model.model.layers[1].mlp)
    else:
        model.lm_head = Held(model.lm_head)
    return model


COMPILED = {
    "whole call": lambda model: torch.compile(called(model), backend="eager"),
    "model": lambda model: torch.compile(model, backend="eager"),
    "layers": compiled_per_layer,
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("where", ["decoder", "head"])
def test_compiled_forwards_in_two_threads_are_refused_without_harm_to_the_first(how, where, monkeypatch):
    """The second begins while the first is in the middle of its forward."""
    torch._dynamo.reset()
    model = hold(build(), where)
    calls = batches(0)
    compiled = COMPILED[how](model)
    under_way, refused = threading.Event(), threading.Event()
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        compiled(**calls[0])

        def slow():
            if threading.current_thread() is not threading.main_thread() and not under_way.is_set():
                under_way.set()
                refused.wait(timeout=60)

        monkeypatch.setattr(Held, "then", slow)

        def first():
            with torch.no_grad():
                compiled(**calls[1])

        def second():
            under_way.wait(timeout=60)
            try:
                with (
                    torch.no_grad(),
                    pytest.raises(Exception, match="at once|another one is under way|as a whole"),
                ):
                    compiled(**calls[2])
            finally:
                refused.set()

        in_threads([first, second])
        compiled(**calls[2])
        results = hooks.get_results()
    torch._dynamo.reset()
    check(results, build(), calls, "all")
    assert set(results) > set(METRICS)


@pytest.mark.parametrize("what", ["get_results", "state", "reset", "load_state"])
@pytest.mark.parametrize("where", ["decoder", "head"])
def test_a_forward_that_is_compiled_as_a_whole_is_not_disturbed_from_another_thread(what, where, monkeypatch):
    """It reads and writes the committed moments by itself."""
    torch._dynamo.reset()
    model = hold(build(), where)
    calls = batches(0)
    compiled = COMPILED["whole call"](model)
    under_way, asked = threading.Event(), threading.Event()
    with fastheads.HookManager(model, "all", group_bytes=0) as hooks, torch.no_grad():
        compiled(**calls[0])
        recorder = recorder_of(hooks)
        saved = state(recorder)
        ask_for = {
            "get_results": hooks.get_results,
            "state": lambda: state(recorder),
            "reset": hooks.reset,
            "load_state": lambda: load_state(recorder, *saved),
        }

        def slow():
            under_way.set()
            asked.wait(timeout=60)

        def run():
            with torch.no_grad():
                compiled(**calls[1])

        def ask():
            under_way.wait(timeout=60)
            try:
                with pytest.raises(fastheads.FastheadsError, match="as a whole is under way"):
                    ask_for[what]()
            finally:
                asked.set()

        monkeypatch.setattr(Held, "then", slow)
        in_threads([run, ask])
        compiled(**calls[2])
        results = hooks.get_results()
    torch._dynamo.reset()
    check(results, build(), calls, "all")


@pytest.mark.parametrize("outermost", ["model", "decoder"])
@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_that_are_removed_by_a_hook_of_the_same_call_leave_the_forward_alone(outermost, register, late):
    model = build()
    module = model if outermost == "model" else model.model
    hooks = []
    if not late:
        handle = getattr(module, register)(lambda *_: hooks[0].remove())
    hooks.append(fastheads.HookManager(model, "all"))
    if late:
        handle = getattr(module, register)(lambda *_: hooks[0].remove())
    with torch.no_grad():
        model(**batches(0)[0])
        handle.remove()
        model(**batches(0)[0])
    assert counts_of_nothing(hooks[0]) == [0] * 3


@pytest.mark.parametrize("what", ["attach", "remove"])
def test_hooks_that_come_and_go_while_another_thread_runs_the_model(what):
    """The forward under way does not count, the next one does; neither fails."""
    model = build()
    calls = batches(0)
    found = []
    if what == "remove":
        found.append(fastheads.HookManager(model, "all"))

    def run():
        with torch.no_grad():
            model(**calls[0])

    def change():
        found.append(fastheads.HookManager(model, "all")) if what == "attach" else found[0].remove()

    during_forward(model, run, change)
    (hooks,) = found
    assert counts_of_nothing(hooks) == [0] * 3
    with hooks, torch.no_grad():
        model(**calls[1])
        if what == "attach":
            results = hooks.get_results()
    if what == "attach":
        check(results, model, calls[1:2], "all")


def test_many_forwards_while_hooks_come_and_go():
    model = build()
    over = threading.Event()

    def run():
        with torch.no_grad():
            while not over.is_set():
                model(**batches(0)[0])

    def change():
        try:
            for _ in range(20):
                with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
                    model(**batches(0)[1])
                    counts(hooks)  # no layer was seen to be left out
        finally:
            over.set()

    in_threads([run, change])


def test_nothing_of_an_interrupted_forward_is_kept():
    model = build()

    class Big:
        pass

    def interrupted(*_):
        raise KeyboardInterrupt

    def run():
        mine = Big()
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(**batches(0)[0])
        return weakref.ref(mine)

    with fastheads.HookManager(model, "all"), torch.no_grad():
        model.model.register_forward_pre_hook(lambda *_: None)  # after ours
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupted)
        left = [run() for _ in range(3)]
        handle.remove()
        model(**batches(0)[1])
        gc.collect()
        assert [ref() for ref in left] == [None] * 3


def test_a_forward_that_a_graph_held_as_a_whole_uses_the_managers_own_queues_on_any_device():
    """Its graph broke, and its decoder runs in plain Python where no weight lies."""
    with fastheads.HookManager(build(), "all") as hooks:
        recorder = recorder_of(hooks)
        queue = recorder.sink.queue_of(recorder.forwards.whole, torch.device("meta"))
        assert queue is recorder.queues.on(torch.device("meta"))
        assert isinstance(queue.state, CommittedState)
