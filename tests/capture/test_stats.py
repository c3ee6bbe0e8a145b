"""`HookManager.stats`: what it counts on the CPU. Of repeated and deferred launches: test_repeated_launches.py."""

import dataclasses
import sys
import threading

import pytest
import torch
from oracle import WITHOUT_RATIO
from tiny_models import build, tokens

import fastheads
from fastheads.capture.manager import recorder_of

ONE = 2 * 6 * 96 * 4  # bytes of an input


def seen_behind_each_projection(model, hooks):
    """`hooks.stats` as it is behind each projection of the forwards to come."""
    seen = []
    for site in hooks.sites:
        site.module.register_forward_hook(lambda *_: seen.append(hooks.stats))
    return seen


def test_inputs_are_kept_until_one_launch_at_the_end_and_nothing_is_held_then():
    model = build()
    with fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO) as hooks, torch.no_grad():
        seen = seen_behind_each_projection(model, hooks)
        assert dataclasses.astuple(hooks.stats) == (0, 0, 0, 0, 0)
        for forwards in range(2):
            model(input_ids=tokens(2, 6))
            assert [(s.launches, s.kept_bytes) for s in seen] == [(forwards, n * ONE) for n in (1, 2, 3)]
            assert dataclasses.astuple(hooks.stats) == (forwards + 1, 0, 0, 0, 0)
            seen.clear()


def test_inputs_that_are_measured_at_once_are_a_launch_each():
    model = build()
    with fastheads.HookManager(model, "all", group_bytes=0) as hooks, torch.no_grad():
        seen = seen_behind_each_projection(model, hooks)
        model(input_ids=tokens(2, 6))
        assert [(s.launches, s.kept_bytes) for s in seen] == [(1, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize(
    ("family", "options", "launches"), [("llama", {"kv_groups": True}, 2), ("gemma2", {}, 2)]
)
def test_what_is_measured_once_more_counts_once_more(family, options, launches):
    model = build(family)
    with fastheads.HookManager(model, "all", **options) as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        assert hooks.stats.launches == launches


def test_memory_that_inputs_share_counts_once():
    model = build()
    whole = torch.empty(3, 2, 6, 96)
    for layer, part in zip(model.model.layers, whole, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _module, args, part=part: (part.copy_(args[0]),)
        )
    with fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO) as hooks, torch.no_grad():
        seen = seen_behind_each_projection(model, hooks)
        with pytest.raises(fastheads.errors.ForwardError, match="reuses its memory"):
            model(input_ids=tokens(2, 6))
        assert [s.kept_bytes for s in seen] == [3 * ONE] * 3
        assert hooks.stats.kept_bytes == 0


def test_a_reset_sets_it_to_zero_and_removing_the_hooks_leaves_it():
    model = build()
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        hooks.reset()
        assert hooks.stats == type(hooks.stats)(0, 0, 0, 0, 0)
        model(input_ids=tokens(2, 6))
        with hooks.paused():
            model(input_ids=tokens(2, 6))
    assert hooks.stats == type(hooks.stats)(1, 0, 0, 0, 0)


def test_launches_of_a_forward_that_fails_count_and_its_inputs_are_let_go():
    model = build()
    with (
        fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO, group_bytes=2 * ONE) as hooks,
        torch.no_grad(),
    ):
        model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=tokens(2, 6))
        assert (hooks.stats.launches, hooks.stats.kept_bytes) == (1, 0)


def test_compiled_forwards_count():
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, backend="eager")
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        for n in range(3):
            assert hooks.stats.launches == n
            compiled(input_ids=tokens(2, 6))
    torch._dynamo.reset()


def test_it_is_read_only():
    with fastheads.HookManager(build()) as hooks:
        with pytest.raises(AttributeError):
            hooks.stats = None
        with pytest.raises(dataclasses.FrozenInstanceError):
            hooks.stats.launches = 1


def test_inputs_of_forwards_in_two_threads_are_both_held_and_nobody_waits_to_read():
    model = build()
    meet, read = threading.Barrier(3), threading.Event()

    def wait(*_):
        meet.wait(timeout=30)
        read.wait(timeout=30)

    def run():
        with torch.no_grad():
            model(input_ids=tokens(2, 6))

    with fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO) as hooks:
        model.model.layers[1].self_attn.o_proj.register_forward_hook(wait)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        meet.wait(timeout=30)
        assert (hooks.stats.launches, hooks.stats.kept_bytes) == (0, 4 * ONE)
        read.set()
        for thread in threads:
            thread.join(timeout=60)
        assert (hooks.stats.launches, hooks.stats.kept_bytes) == (2, 0)


def test_it_can_be_read_while_a_forward_in_another_thread_meets_more_devices():
    with fastheads.HookManager(build()) as hooks:
        forwards = recorder_of(hooks).forwards
        beside = forwards.push_beside(hooks.model, None, None)
        queue = recorder_of(hooks).queues.on(torch.device("cpu"))
        devices = [torch.device(kind, n) for kind in ("cuda", "xpu", "meta", "hpu") for n in range(100)]
        done, interval = threading.Event(), sys.getswitchinterval()

        def meet():
            while not done.is_set():
                for device in devices:
                    beside.queues[device] = queue
                beside.queues.clear()

        thread = threading.Thread(target=meet)
        sys.setswitchinterval(1e-6)
        try:
            thread.start()
            for _ in range(100_000):
                forwards.queues_beside()
        finally:
            done.set()
            sys.setswitchinterval(interval)
            thread.join()
