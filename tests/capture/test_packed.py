"""Packed rows: each segment is a sequence of its own, whether cu_seq_lens_q or the positions tell of it."""

import os

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.backends.torch_paths import Factored
from fastheads.basic import HookManager as BasicHookManager
from fastheads.stats.metrics import samples
from fastheads.stats.token_layout import DecoderArguments

BACKENDS = ("loop", "einsum", "factored", "basic")
if os.environ.get("TRITON_INTERPRET") == "1":  # as test_kernel.py runs this file once more
    BACKENDS = ("triton",)
RTOL = 5e-6  # as in test_backends.py

# Each call: its rows, and in each row the lengths of its segments. Lengths of 1 and 2 are what skip_first leaves nothing of.
CALLS = [[[5, 1, 7, 2]], [[15]], [[3, 4], [6, 1], [2, 5]]]


def positions_of(call):
    return torch.tensor([[p for length in row for p in range(length)] for row in call])


def cu_of(call):
    lengths = [0, *[length for row in call for length in row]]
    return torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def arguments(call, how, seed=0):
    positions = positions_of(call)
    given = dict(input_ids=tokens(*positions.shape, seed=seed), use_cache=False)
    return given | (dict(position_ids=positions) if how == "positions" else dict(cu_seq_lens_q=cu_of(call)))


def segments(inputs, calls):
    """The captured inputs `[B, S, W]` cut into their segments, `[1, length, W]` each: what the oracle takes for forwards."""
    cut = []
    for of_site in inputs:
        cut.append([])
        for x, call in zip(of_site, calls, strict=True):
            for b, row in enumerate(call):
                cut[-1] += [part[None] for part in x[b, : sum(row)].split(row)]
    return cut


def assert_segments(results, sites, inputs, calls, token_agg, rtol=RTOL, skip_first=0):
    cut = segments(inputs, calls)
    assert_results(results, sites, cut, [None] * len(cut[0]), token_agg, rtol, skip_first)


@pytest.mark.parametrize("skip_first", [0, 2])
@pytest.mark.parametrize("how", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_segment_is_a_sequence(backend, token_agg, how, skip_first):
    if backend == "basic" and skip_first:
        pytest.skip("the basic manager has no skip_first")
    model = build()
    sites = fastheads.find_sites(model)
    manager = (
        BasicHookManager(model, token_agg)
        if backend == "basic"
        else fastheads.HookManager(model, token_agg, backend=backend, skip_first=skip_first)
    )
    with captured_inputs([s.module for s in sites]) as inputs, manager as hooks, torch.no_grad():
        for i, call in enumerate(CALLS):
            model(**arguments(call, how, seed=i))
        results = hooks.get_results()
    assert_segments(results, sites, inputs, CALLS, token_agg, skip_first=skip_first)
    assert backend == "basic" or results["metadata"]["backend"] == backend


@pytest.mark.parametrize("group_bytes", [0, 2**26])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_segments_and_tokens_after_the_last(backend, token_agg, group_bytes):
    """Some callers fill cu_seq_lens_q up to one length, and the row up to another."""
    if backend == "basic":
        manager = BasicHookManager
    else:
        manager = lambda *args: fastheads.HookManager(*args, backend=backend, group_bytes=group_bytes)  # noqa: E731
    model = build()
    sites = fastheads.find_sites(model)
    cu = torch.tensor([0, 0, 4, 4, 9, 9, 9], dtype=torch.int32)
    with captured_inputs([s.module for s in sites]) as inputs, manager(model, token_agg) as hooks:
        model.model(input_ids=tokens(1, 12), cu_seq_lens_q=cu)
        results = hooks.get_results()
    assert_segments(results, sites, inputs, [[[4, 5]]], token_agg)


def test_packed_together_or_alone():
    """A model that keeps the segments apart gives the same numbers for a packed row as for each sequence alone."""
    model = build(dtype=torch.float64)
    call = [[4, 1, 6], [5, 5, 1]]
    ids, positions = tokens(2, 11), positions_of(call)
    for token_agg in ("last", "all", "token"):
        with torch.no_grad():
            with fastheads.HookManager(model, token_agg) as hooks:
                model(input_ids=ids, position_ids=positions, use_cache=False)
                packed = hooks.get_results()
            with fastheads.HookManager(model, token_agg) as hooks:
                for b, row in enumerate(call):
                    for part in ids[b].split(row):
                        model(input_ids=part[None], use_cache=False)
                alone = hooks.get_results()
        for metric in METRICS:
            for stat, value in alone[metric].items():
                torch.testing.assert_close(packed[metric][stat], value, rtol=1e-9, atol=1e-12)


def test_a_mask_beside_cu_seq_lens_is_padding():
    model = build()
    sites = fastheads.find_sites(model)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0]])
    cu = torch.tensor([0, 6, 7, 12])
    for form in (mask, torch.ones(12, 12).tril().bool()[None, None] & mask.bool()[:, None, None]):
        with (
            captured_inputs([s.module for s in sites]) as inputs,
            fastheads.HookManager(model, "all") as hooks,
        ):
            model.model(input_ids=tokens(1, 12), cu_seq_lens_q=cu, attention_mask=form)
            results = hooks.get_results()
        cut = [[x[:, 0:6], x[:, 6:7], x[:, 7:12]] for (x,) in inputs]
        masks = [mask[:, 0:6].tolist(), mask[:, 6:7].tolist(), mask[:, 7:12].tolist()]
        assert_results(results, sites, cut, masks, "all", RTOL)


def test_a_mask_goes_before_positions():
    """Left padding looks like positions that start again."""
    model = build()
    sites = fastheads.find_sites(model)
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with captured_inputs([s.module for s in sites]) as inputs, fastheads.HookManager(model, "all") as hooks:
        model.model(input_ids=tokens(2, 6), position_ids=positions, attention_mask=mask)
        assert_results(hooks.get_results(), sites, inputs, [mask.tolist()], "all", RTOL)


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("skip_first", [0, 1])
def test_without_waiting_for_the_positions(token_agg, skip_first):
    """In compiled code they are not read, as on a GPU where transformers does not read them: the same samples from as many
    segments as tokens.
    """
    torch._dynamo.reset()
    model = build(num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    sites = fastheads.find_sites(model)
    calls = [*CALLS, [[4], [4]]]
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        with fastheads.HookManager(model, token_agg, skip_first=skip_first) as hooks:
            for i, call in enumerate(calls):
                compiled(**arguments(call, "positions", seed=i))
            results = hooks.get_results()
    torch._dynamo.reset()
    assert_segments(results, sites, inputs, calls, token_agg, skip_first=skip_first)


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens"])
def test_nothing_is_read_from_a_device(how):
    """A meta tensor has no values: reading one raises."""
    reader = DecoderArguments(build().model)
    given = {
        name: value.to("meta") for name, value in arguments(CALLS[2], how).items() if name != "use_cache"
    }
    real = reader.token_layout((), given, 1)
    assert real.valid.shape == (3, 7)
    assert [t.shape for t in real.last_of_sequences] == [(real.cu_seqlens.shape[0] - 1,)] * 2


def test_positions_are_read_where_transformers_reads_them(monkeypatch):
    """It does so to make its mask, where there is no cache: not where the decoder makes one."""
    model = build()
    read = []
    find = tf_masks().find_packed_sequence_indices
    monkeypatch.setattr(
        tf_masks(), "find_packed_sequence_indices", lambda p: read.append(len(read)) or find(p)
    )
    reader = DecoderArguments(model.model)
    positions = torch.arange(6)[None]
    given = {"input_ids": tokens(1, 6), "position_ids": positions}

    def is_read(**options):
        """A meta tensor has no values: reading one raises."""
        try:
            reader.token_layout((), given | {"position_ids": positions.to("meta")} | options, 0)
        except RuntimeError:
            return True
        return False

    for use_cache in (None, True, False):
        read.clear()
        with torch.no_grad():
            model.model(**given, use_cache=use_cache)
        assert is_read(use_cache=use_cache) == bool(read), use_cache
    # On a CPU nobody waits: they are read, and found to be those of one sequence.
    assert reader.token_layout((), given, 0).cu_seqlens is None


def tf_masks():
    import transformers.masking_utils

    return transformers.masking_utils


def test_a_sample_that_is_nan_stays_in_its_segment():
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    x[0, 0, 4] = torch.nan
    bounds = torch.tensor([0, 3, 6, 9])
    factors = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)

    def norms_of(z):
        return Factored().contribution_norms(z.flatten(2), factors)

    mask = torch.ones(1, 9, dtype=torch.bool)
    values, present = samples(x, mask, "all", 2, norms_of, cu_seqlens=bounds)
    assert present.tolist() == [True] * 3
    assert values.isnan().flatten(1).all(1).tolist() == [False, True, False]
    norms = x[0, 0].view(9, 2, 4).norm(dim=-1)
    torch.testing.assert_close(values[2, 0, 0], norms[6:9].mean(0))
    mask[0, 4] = False  # padding may hold NaN
    values, _ = samples(x, mask, "all", 2, norms_of, cu_seqlens=bounds)
    torch.testing.assert_close(values[1, 1, 0], norms[[3, 5]].mean(0))


def test_positions_of_models_with_axes():
    """Qwen2-VL's decoder takes the text's positions and those along three axes in one tensor."""
    positions = positions_of([[3, 4], [2, 5]])
    given = dict(inputs_embeds=torch.zeros(2, 7, 8), position_ids=positions.expand(4, 2, 7))
    real = DecoderArguments(build().model).token_layout((), given, 0)
    assert real.cu_seqlens.tolist() == [0, 3, 7, 9, 14]
    given["position_ids"] = positions.expand(
        3, 2, 7
    )  # without the text's: of no consequence for the segments
    assert DecoderArguments(build().model).token_layout((), given, 0).cu_seqlens is None


@pytest.mark.parametrize("manager", [fastheads.HookManager, BasicHookManager])
@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0, 3, 7], r"cu_seq_lens_q.*0 to at most 6.*\[0, 3, 7\]"),
        ([0, 4, 3], "cu_seq_lens_q"),
        ([-1, 3], "cu_seq_lens_q"),
        ([6], "cu_seq_lens_q"),
        ([[0, 6]], "cu_seq_lens_q"),
        ([0.0, 6.0], "cu_seq_lens_q"),
    ],
)
def test_a_wrong_cu_seq_lens_is_refused(manager, cu, message):
    model = build()
    with manager(model) as hooks, torch.no_grad():
        with pytest.raises(ValueError, match=message):
            model.model(input_ids=tokens(1, 6), cu_seq_lens_q=torch.tensor(cu))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("skip_first", [0, 2])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_in_one_graph(dynamo, token_agg, how, skip_first):
    """How many segments there are is the tensor's shape, or not known to the graph at all."""
    model = build(num_hidden_layers=2)
    sites = fastheads.find_sites(model)
    calls = [[[5, 1, 7, 2]], [[3, 3, 9]], [[15]], [[2, 9], [6, 5]]]
    given = [arguments(call, how, seed=i) for i, call in enumerate(calls)]
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        for kwargs in given:
            model(**kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(model, token_agg, skip_first=skip_first) as hooks:
        for kwargs in given:
            compiled(**kwargs)
        assert_segments(hooks.get_results(), sites, inputs, calls, token_agg, 1e-4, skip_first)
    assert not dynamo["graph_break"]


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens"])
@pytest.mark.parametrize("part", ["decoder", "layers", "eager attention"])
def test_where_a_part_is_compiled(dynamo, part, how):
    """The segments are then told outside the graph that measures, or inside one that eager code interrupts."""
    model = build(num_hidden_layers=2)
    calls = [[[5, 1, 7]], [[3, 4], [6, 1]]]
    sites = fastheads.find_sites(model)
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        for i, call in enumerate(calls):
            model(**arguments(call, how, seed=i))
    run = model
    if part == "decoder":
        model.model.compile(backend="aot_eager")
    elif part == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    else:
        attention = model.model.layers[1].self_attn
        attention.forward = torch.compiler.disable(attention.forward)
        run = torch.compile(model, backend="aot_eager")
    # Without it Dynamo gives up the graphs of all callers of the eager code, the decoder's among them.
    nested = torch._dynamo.config.patch(nested_graph_breaks=True)
    with nested, torch.no_grad(), fastheads.HookManager(model, "last") as hooks:
        for i, call in enumerate(calls):
            run(**arguments(call, how, seed=i))
        assert_segments(hooks.get_results(), sites, inputs, calls, "last", 1e-4)
