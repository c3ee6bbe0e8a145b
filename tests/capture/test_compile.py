"""Under torch.compile the hooks count as they do without; what they add makes no graph break and no recompilation."""

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.capture.projection_hook import TRACED_ATTRIBUTE

MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1] * 6])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def calls():
    return [dict(input_ids=tokens(3, 6, seed=i), attention_mask=MASK) for i in range(2)] + [
        dict(input_ids=tokens(3, 6, seed=2))
    ]


def eagerly(model, token_agg="all", batches=None, **options):
    with fastheads.HookManager(model, token_agg, **options) as hooks, torch.no_grad():
        for batch in batches or calls():
            model(**batch)
        return hooks.get_results()


def assert_same(got, want):
    for metric in METRICS:
        for stat, value in want[metric].items():
            # the compiled model's own products differ from the eager one's in float32's last digits
            torch.testing.assert_close(
                got[metric][stat],
                value,
                rtol=1e-4,
                atol=1e-6,
                equal_nan=True,
                msg=lambda m, k=(metric, stat): f"{k} {m}",
            )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_fullgraph_counts_rightly(backend, token_agg):
    model = build()
    want = eagerly(model, token_agg)
    with fastheads.HookManager(model, token_agg) as hooks, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for batch in calls():
            compiled(**batch)
        assert_same(hooks.get_results(), want)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
def test_every_backend(backend):
    model = build()
    want = eagerly(model, backend=backend)
    with fastheads.HookManager(model, "all", backend=backend) as hooks, torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for batch in calls():
            compiled(**batch)
        assert_same(hooks.get_results(), want)


def compile_model(model):
    return torch.compile(model, backend="aot_eager")


def compile_in_place(model):
    model.compile(backend="aot_eager")
    return model


def compile_the_decoder(model):
    model.model.compile(backend="aot_eager")
    return model


def compile_each_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


def compile_a_step(model):
    return torch.compile(lambda **batch: model(**batch).logits, backend="aot_eager")


@pytest.mark.parametrize(
    "how", [compile_model, compile_in_place, compile_the_decoder, compile_each_layer, compile_a_step]
)
def test_attach_before_and_after_compiling_detach_and_attach_again(how):
    model = build()
    want, twice = eagerly(model), eagerly(model, batches=calls() * 2)
    with torch.no_grad():
        first = fastheads.HookManager(model, "all")
        compiled = how(model)
        for batch in calls():
            compiled(**batch)
        assert_same(first.get_results(), want)
        first.remove()
        for batch in calls():
            compiled(**batch)  # counts nowhere
        assert_same(first.get_results(), want)
        for _ in range(2):
            with fastheads.HookManager(model, "all") as again:
                for batch in calls():
                    compiled(**batch)
                with again.paused():
                    compiled(**calls()[0])
                for batch in calls():
                    compiled(**batch)
                assert_same(again.get_results(), twice)


def test_two_managers():
    model = build()
    want, last = eagerly(model), eagerly(model, "last")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(model, "all") as one:
        compiled(**calls()[0])
        one.reset()
        with fastheads.HookManager(model, "last") as two:
            for batch in calls():
                compiled(**batch)
            assert_same(two.get_results(), last)
        assert_same(one.get_results(), want)


def test_repeated_calls_and_dynamic_lengths_do_not_recompile():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        lengths = [5, 9, 17, 33, 12, 50]
        for i, n in enumerate(lengths):
            compiled(input_ids=tokens(2, n, seed=i), use_cache=False)
            if i == 1:
                warm = graphs()
        assert graphs() == warm
        assert (hooks.get_results()["head_output_norm"]["count"] == 2 * len(lengths)).all()


def test_what_a_graph_reads_of_a_hooked_projection_is_constants():
    """Else Dynamo looks at each layer of the model anew in each call, where it looks at constants once."""
    model = build()
    with fastheads.HookManager(model), fastheads.HookManager(model, "all") as hooks:
        for site in hooks.sites:
            read = vars(site.module)[TRACED_ATTRIBUTE]
            assert type(read) is tuple and len(read) == 2
            leaves = list(read)
            while any(isinstance(leaf, tuple) for leaf in leaves):
                leaves = [x for leaf in leaves for x in (leaf if isinstance(leaf, tuple) else (leaf,))]
            assert {type(leaf) for leaf in leaves} == {int, str}
    assert not any(TRACED_ATTRIBUTE in vars(module) for module in model.modules())


@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)
def test_a_graph_looks_at_a_hooked_layer_in_one_look():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), fastheads.HookManager(model, "all"):
        compiled(**calls()[0])
        seen = {
            name for name in whole_modules(type(model).forward) if ".layers." in name or "['layers']" in name
        }
    # The first is looked at by its parts: with it Dynamo guards what the `forward` of all of them runs.
    others = {name for name in seen if "['layers']._modules['0']" not in name}
    assert len(others) == len(model.model.layers) - 1, seen
    assert not any(name.count("_modules") > others.copy().pop().count("_modules") for name in others), seen


def whole_modules(function):
    """The sources of the modules that the guards of a function's graphs look at as a whole."""
    found = set()

    def visit(guards):
        if guards.is_tag_safe_root():
            found.add(guards.get_source())
        elif isinstance(guards, torch._C._dynamo.guards.DictGuardManager):
            pairs = guards.get_key_value_managers().values()
            children = [child for pair in pairs for child in pair if child is not None]
            for child in children:
                visit(child)
        if not guards.is_tag_safe_root():
            for child in guards.get_child_managers():
                visit(child)

    while function is not None:
        for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__):
            visit(entry.guard_manager.root)
        function = getattr(function, "__wrapped__", None)
    return found


@pytest.mark.parametrize("group_bytes", [0, 2 * 3 * 6 * 96 * 4])
def test_the_budget_is_decided_when_the_graph_is_made(group_bytes):
    model = build()
    want = eagerly(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks:
        for batch in calls():
            compiled(**batch)
        assert_same(hooks.get_results(), want)


def test_generate_with_a_static_cache_counts_prefill_and_decode():
    model = build()
    sites = fastheads.find_sites(model)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation="static")
    ids, mask = tokens(3, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    with captured_inputs([s.module for s in sites]) as inputs:
        model.generate(ids, attention_mask=mask, disable_compile=True, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    model.generate(ids, attention_mask=mask, disable_compile=True, **options)
    with fastheads.HookManager(model, "all") as hooks:
        model.generate(ids, attention_mask=mask, disable_compile=True, **options)
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask.tolist()] + [[[1]] * 3] * 4, "all", 1e-4)


def test_a_failed_forward_counts_nothing():
    model = build()
    want = eagerly(model)
    model.model.compile(backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        for batch in calls():
            handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(**batch)
            handle.remove()
            model(**batch)
        assert_same(hooks.get_results(), want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inputs_in_one_buffer_are_refused(backend):
    """As without compiling: what the first layers left there is gone when the group is measured."""
    model = build()
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    buffer = torch.zeros(2, 5, projections[0].in_features)

    def into_the_buffer(module, args):
        buffer.copy_(args[0])
        return (buffer,)

    for module in projections:
        module.register_forward_pre_hook(into_the_buffer)
    batch = dict(input_ids=tokens(2, 5), use_cache=False)
    want = eagerly(model, batches=[batch], group_bytes=0)
    compiled = torch.compile(model, backend=backend)
    with (
        torch.no_grad(),
        fastheads.HookManager(model, "all"),
        pytest.raises(RuntimeError, match="reuses its"),
    ):
        compiled(**batch)
    with torch.no_grad(), fastheads.HookManager(model, "all", group_bytes=0) as hooks:
        compiled(**batch)
        assert_same(hooks.get_results(), want)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, while it traces
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_and_the_recomputation_is_not_counted(checkpointing):
    model = build().train()
    if checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable()
    ids = tokens(2, 6)

    def gradients(run):
        model.zero_grad()
        run(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    compiled = torch.compile(model, backend="aot_eager")
    plain = gradients(compiled)
    with fastheads.HookManager(model, "all") as hooks:
        hooked = gradients(compiled)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))


def assert_counts_like_eager(model, run, want):
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        for batch in calls():
            run(**batch)
        assert_same(hooks.get_results(), want)


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
def test_attention_that_runs_eagerly_inside_a_compiled_decoder(layers):
    model = build()
    want = eagerly(model)
    for n in layers:
        attention = model.model.layers[n].self_attn
        attention.forward = torch.compiler.disable(attention.forward)
    assert_counts_like_eager(model, torch.compile(model, backend="aot_eager"), want)
    torch._dynamo.reset()
    model.model.compile(backend="aot_eager")
    assert_counts_like_eager(model, model, want)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_forward_that_fails_after_a_graph_break_counts_nothing(layer, error):
    model = build()
    want = eagerly(model)
    failing = []

    @torch.compiler.disable
    def fail(*_):
        if failing:
            raise error

    model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        for batch in calls():
            failing.append(1)
            with pytest.raises(error):
                compiled(**batch)
            failing.clear()
            compiled(**batch)
        assert_same(hooks.get_results(), want)


def test_a_token_mask_is_an_input_of_the_graph():
    """Neither its values nor its being there are baked in."""
    model = build()
    masks = [torch.rand(3, 6, generator=torch.Generator().manual_seed(seed)) < 0.6 for seed in range(3)]
    given = dict(input_ids=tokens(3, 6), attention_mask=MASK)

    def run(model, hooks):
        for mask in masks:
            with hooks.token_mask(mask):
                model(**given)
        model(**given)
        with hooks.token_mask(lambda given: given["input_ids"] > 40):
            model(**given)
        return hooks.get_results()

    with torch.no_grad():
        with fastheads.HookManager(model, "all") as hooks:
            want = run(model, hooks)
        for how in (compile_model, compile_the_decoder):
            with fastheads.HookManager(model, "all") as hooks:
                assert_same(run(how(model), hooks), want)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with fastheads.HookManager(model, "all") as hooks:
            with hooks.token_mask(masks[0]):
                compiled(**given)
            before = graphs()
            for mask in masks[1:]:
                with hooks.token_mask(mask):
                    compiled(**given)
            assert graphs() == before
            with hooks.token_mask(torch.ones(3, 5).bool()), pytest.raises(Exception, match="token_mask"):
                compiled(**given)


def test_a_changed_weight_is_seen():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    o_proj = model.model.layers[1].self_attn.o_proj
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        compiled(**calls()[0])
        before = hooks.get_results()["head_residual_contribution_norm"]["mean"][1]
        hooks.reset()
        o_proj.weight.mul_(3)
        compiled(**calls()[0])
        after = hooks.get_results()["head_residual_contribution_norm"]["mean"][1]
        torch.testing.assert_close(after, 3 * before, rtol=1e-5, atol=0)
        o_proj.weight.data.mul_(3)
        compiled(**calls()[0])
        with pytest.raises(fastheads.StaleFactorError):
            hooks.get_results()
