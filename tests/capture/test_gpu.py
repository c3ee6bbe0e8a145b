"""The manager on a GPU: the fused kernel behind the hooks, compiled forwards, CUDA graphs, streams, running out of memory."""

import contextlib
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs, equal_results
from tiny_models import build, tokens

import fastheads
from fastheads.capture.manager import recorder_of
from fastheads.stats.moments import RunningMoments
from fastheads.stats.token_layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch's own first one, of reduce-overhead
]

# bfloat16 inputs: the exact kernel's own error per token is 5e-6; the means of float32 norms stay below.
RTOL = 1e-5
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1] * 6])


def gpu_model(dtype=torch.bfloat16, **changes):
    return build(dtype=dtype, head_dim=32, **changes).cuda()


def batches(n=3):
    return [
        dict(input_ids=tokens(3, 6, seed=i).cuda(), attention_mask=MASK.cuda(), use_cache=False)
        for i in range(n)
    ]


def eagerly(model, token_agg="all", n=3, **options):
    with fastheads.HookManager(model, token_agg, **options) as hooks, torch.no_grad():
        for batch in batches(n):
            model(**batch)
        return hooks.get_results()


def assert_same(got, want, rtol=RTOL):
    for metric in METRICS:
        for stat, value in want[metric].items():
            torch.testing.assert_close(got[metric][stat], value, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("group_bytes", [0, 64 << 20])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_the_kernel_and_agrees_with_the_oracle(dtype, token_agg, group_bytes):
    model = gpu_model(dtype)
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, group_bytes=group_bytes) as hooks,
        torch.inference_mode(),
    ):
        for batch in batches():
            model(**batch)
        results = hooks.get_results()
    assert results["metadata"]["backend"] == "triton"
    assert_results(results, sites, inputs, [MASK.tolist()] * 3, token_agg, RTOL)


def test_autocast_and_tf32_change_no_number():
    model = gpu_model(torch.float32)
    for backend in ("auto", "factored", "einsum", "loop"):
        sites = fastheads.find_sites(model)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            with (
                captured_inputs([s.module for s in sites]) as inputs,
                fastheads.HookManager(model, "all", backend=backend) as hooks,
                torch.no_grad(),
                torch.autocast("cuda", dtype=torch.bfloat16),
            ):
                for batch in batches():
                    model(**batch)
        finally:
            torch.set_float32_matmul_precision(before)
        assert_results(hooks.get_results(), sites, inputs, [MASK.tolist()] * 3, "all", RTOL)


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("group_bytes", [0, 64 << 20])
def test_no_hook_waits_for_the_gpu(token_agg, group_bytes):
    """Hooks of the user's own around those of the library forbid waiting between them. Those of the library come last on the
    model and the decoder, so that what allows waiting again is a hook on the module that runs next.
    """
    model = gpu_model()
    one_forward = batches()[0]
    projections = [site.module for site in fastheads.find_sites(model)]
    on, launches = [], []

    def count():
        stats = hooks.stats
        launches.append(stats.launches + stats.waiting)

    def forbid(*_):
        if on:
            torch.cuda.set_sync_debug_mode("error")
            count()

    def allow(*_):
        torch.cuda.set_sync_debug_mode("default")
        if on:
            count()

    hooks = fastheads.HookManager(model, token_agg, group_bytes=group_bytes)
    model.register_forward_pre_hook(forbid)
    model.model.embed_tokens.register_forward_pre_hook(allow)
    for module in projections:
        module.register_forward_pre_hook(forbid)
        module.register_forward_hook(allow)
    model.model.register_forward_hook(forbid)
    model.lm_head.register_forward_pre_hook(allow)
    model.register_forward_hook(forbid)  # until the call has returned
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode announces itself as a prototype
            model(**one_forward)
            on.append(True)
            model(**one_forward)
            allow()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before, after = launches[::2], launches[1::2]
    assert len(before) == len(after) == len(projections) + 3
    assert after[-1] - before[0] == sum(b - a for a, b in zip(before, after, strict=True)) > 0
    assert (hooks.get_results()["head_output_norm"]["count"] >= 6).all()
    hooks.remove()


def test_a_forward_that_fails_on_a_device_that_no_weight_was_on_counts_nothing():
    """A model that was moved after the hooks were attached."""
    model = build()
    with fastheads.HookManager(model, backend="factored") as hooks, torch.no_grad():
        model.cuda()
        ids = tokens(2, 6).cuda()
        handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids)
        handle.remove()
        model(input_ids=ids)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_compiled(mode, token_agg):
    torch._dynamo.reset()
    model = gpu_model(torch.float32)
    want = eagerly(model, token_agg, n=6)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for batch in batches():
            compiled(**batch)
        for _ in range(2):
            with fastheads.HookManager(model, token_agg) as hooks:
                for batch in batches(6):
                    compiled(**batch)
                assert_same(hooks.get_results(), want, rtol=1e-4)
                hooks.reset()
                for batch in batches(6):
                    compiled(**batch)
                assert_same(hooks.get_results(), want, rtol=1e-4)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    torch._dynamo.reset()


def test_generate_with_a_static_cache_that_transformers_compiles():
    torch._dynamo.reset()
    model = gpu_model()
    ids, mask = tokens(3, 6).cuda(), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]).cuda()
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, cache_implementation="static")
    model.generate(ids, attention_mask=mask, **options)
    with fastheads.HookManager(model, "all") as hooks:
        model.generate(ids, attention_mask=mask, **options)
        assert (hooks.get_results()["head_output_norm"]["count"] == 3 * 8).all()
    torch._dynamo.reset()


@pytest.mark.parametrize("warm_ups", [1, 3])  # one is launched at once; after that they may wait
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_each_replay_of_a_captured_graph_counts(token_agg, warm_ups):
    model = gpu_model()
    ids = tokens(3, 6).cuda()
    hooks = fastheads.HookManager(model, token_agg)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            model(input_ids=ids, use_cache=False)
        model(input_ids=tokens(2, 5).cuda(), use_cache=False)  # what was kept for the form before goes
        for i in range(3):
            ids.copy_(tokens(3, 6, seed=i))
            graph.replay()
        got = hooks.get_results()
        hooks.reset()
        for _ in range(warm_ups):
            model(input_ids=tokens(3, 6).cuda(), use_cache=False)
        model(input_ids=tokens(2, 5).cuda(), use_cache=False)
        for i in range(3):
            model(input_ids=tokens(3, 6, seed=i).cuda(), use_cache=False)
        assert_same(got, hooks.get_results())
        want = hooks.get_results()
        hooks.remove()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert equal_results(hooks.get_results(), want)
        del hooks
        gc.collect()
        torch.cuda.empty_cache()
        canary = [torch.full((1 << 16,), 7.0, device="cuda") for _ in range(64)]
        graph.replay()
        torch.cuda.synchronize()
        assert all((c == 7).all() for c in canary)


def test_a_replay_with_another_weight_is_an_error():
    model = gpu_model()
    ids = tokens(3, 6).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), fastheads.HookManager(model) as hooks:
        model(input_ids=ids, use_cache=False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            model(input_ids=ids, use_cache=False)
        graph.replay()
        hooks.get_results()
        model.model.layers[1].self_attn.o_proj.weight.mul_(2)
        graph.replay()
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1"):
            hooks.get_results()
        model(input_ids=ids, use_cache=False)  # the factor is made anew, but the replay before it counted
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1"):
            hooks.get_results()
        hooks.reset()
        graph.replay()
        hooks.get_results()


def test_forwards_on_several_streams():
    model = gpu_model()
    want = eagerly(model, n=4)
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        for batch in batches(4):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(**batch)
            torch.cuda.current_stream().wait_stream(stream)
        assert_same(hooks.get_results(), want)


def test_a_layer_on_a_side_stream():
    model = gpu_model()
    want = eagerly(model)
    side = torch.cuda.Stream()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def on_the_side(*args, **kwargs):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out = forward(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        return out

    attention.forward = on_the_side
    assert_same(eagerly(model), want)


@pytest.mark.parametrize("where", ["in a layer", "in the logits"])
@pytest.mark.parametrize("group_bytes", [0, 64 << 20])
def test_out_of_memory_and_then_the_batch_in_halves(where, group_bytes):
    model = gpu_model()
    ids = tokens(8, 64, seed=3).cuda()
    with fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks, torch.no_grad():
        for part in ids.split(4):
            model(input_ids=part, use_cache=False)
        want = hooks.get_results()
    module = model.model.layers[1].mlp if where == "in a layer" else model.lm_head

    def exhaust(_module, args):
        if args[0].shape[0] == 8:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    with fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks, torch.no_grad():
        handle = module.register_forward_pre_hook(exhaust)
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=ids, use_cache=False)
        for part in ids.split(4):
            model(input_ids=part, use_cache=False)
        handle.remove()
        results = hooks.get_results()
    # Of forwards that wait for one launch, which ones are measured together depends on what came before: rounding of float64.
    assert_same(results, want, rtol=1e-12)
    assert group_bytes or equal_results(results, want)


def test_the_same_moments_as_factored_after_1000_batches():
    model = gpu_model()
    with (
        torch.inference_mode(),
        fastheads.HookManager(model, "all") as kernel,
        fastheads.HookManager(model, "all", backend="factored") as factored,
    ):
        for i in range(1000):
            model(input_ids=tokens(3, 6, seed=i).cuda(), use_cache=False)
        assert_same(kernel.get_results(), factored.get_results(), rtol=2e-5)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("group_bytes", [0, 64 << 20])
def test_forwards_in_threads_on_the_same_stream_and_on_streams_of_their_own(group_bytes, streams):
    """Each thread's tokens are measured under its own mask, and all are added up."""
    model = gpu_model(torch.float32)
    sites = fastheads.find_sites(model)
    calls = [batch for _ in range(4) for batch in batches()]
    with captured_inputs([s.module for s in sites]) as inputs, torch.inference_mode():
        for call in calls:
            model(**call)
    with fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks:

        def run(part):
            context = torch.cuda.stream(torch.cuda.Stream()) if streams else contextlib.nullcontext()
            torch.cuda.synchronize()
            with context, torch.inference_mode():
                for call in part:
                    model(**call)
                torch.cuda.current_stream().synchronize()

        third = len(calls) // 3
        parts = [calls[:third], calls[third : 2 * third], calls[2 * third :]]
        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(run, part) for part in parts]:
                future.result(timeout=120)
        results = hooks.get_results()
    masks = [None if (mask := call.get("attention_mask")) is None else mask.cpu().numpy() for call in calls]
    assert_results(results, sites, inputs, masks, "all", 1e-4)


def test_launches_that_share_factors_are_ordered_over_streams():
    """A factor counts the programs of its launch that have ended: two launches at once would take each other's for their own."""
    model = gpu_model()
    with fastheads.HookManager(model, "all") as hooks:
        accumulator = recorder_of(hooks).scope.accumulator
        site = fastheads.find_sites(model)[0]
        x = torch.randn(2, 6, site.num_heads * site.head_dim, dtype=model.dtype, device="cuda")
        layout = TokenLayout()
        streams = [torch.cuda.Stream() for _ in range(2)]
        moments = [RunningMoments(4, 3, site.num_heads, x.device) for _ in streams]
        for warm in moments:
            accumulator.record([0], [x], layout, warm)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(10**9)
            accumulator.record([0], [x], layout, moments[0])
        with torch.cuda.stream(streams[1]):
            accumulator.record([0], [x], layout, moments[1])
        assert not streams[1].query()
        torch.cuda.synchronize()
    for each in moments:
        assert (each.views().count[:, 0] == 4).all()
