"""Pruned models, against copies with the columns zeroed or the heads replaced by hand, in float64; and what is refused."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import build, tokens
from torch import nn

from fastheads import HeadProfile, find_sites
from fastheads.errors import OptionError, PlanError, PruningError, ResultsError
from fastheads.intervene import pruning
from fastheads.intervene.plan import PruningPlan, plan_pruning
from fastheads.intervene.pruning import pruned_copy
from fastheads.models.fingerprint import fingerprint
from fastheads.results.mean_vectors import MeanVectors
from fastheads.run import pruned_folder
from fastheads.run.pruned_folder import compare_models, write_pruned
from fastheads.stats.moments import Moments
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC

HEADS = [(0, 1), (1, 0), (1, 2), (2, 3)]
GROUPS = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1)]  # of two query heads each, one a layer
UNIFORM = ["llama", "llama-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite"]
SMALL = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2)
OTHERS = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=64, **SMALL)),
    "phi": (
        tf.PhiForCausalLM,
        tf.PhiConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, **SMALL
        ),
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            **SMALL,
        ),
    ),
}


def make(family, seed=0):
    """A model of the family in float64, or where its experts have no kernel for that in float32."""
    if family not in OTHERS:
        return build(family, dtype=torch.float32 if family == "mixtral" else torch.float64, seed=seed)
    torch.manual_seed(seed)
    kind, config = OTHERS[family]
    return kind(config).double().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(2, 12)).logits.double()


def inputs(model, run):
    """What reaches each projection, by site: `[batch, seq, width]`."""
    found, handles = {}, []
    for row, site in enumerate(find_sites(model)):

        def keep(_, args, row=row):
            found[row] = args[0].detach()

        handles.append(site.module.register_forward_pre_hook(keep))
    run(model)
    for handle in handles:
        handle.remove()
    return found


def silenced(model, heads, means=None):
    """The logits with the columns of heads zeroed by hand, or with z replaced by its mean."""
    if means is None:
        model = copy.deepcopy(model)
        for site in find_sites(model):
            weight = site.module.weight.data
            for layer, head in heads:
                if layer == site.layer:
                    part = slice(head * site.head_dim, (head + 1) * site.head_dim)
                    if isinstance(site.module, nn.Linear):
                        weight[:, part] = 0
                    else:  # Conv1D
                        weight[part] = 0
        return logits(model)
    handles = []
    for row, site in enumerate(find_sites(model)):

        def replace(_, args, row=row, site=site):
            z = args[0].clone().unflatten(-1, (site.num_heads, site.head_dim))
            for layer, head in heads:
                if layer == site.layer:
                    z[..., head, :] = torch.tensor(means[row, head])
            return (z.flatten(-2),)

        handles.append(site.module.register_forward_pre_hook(replace))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def profile_of(model, metrics=(RATIO_METRIC,), vectors=True, seed=1):
    """A profile with random metrics, and with the true means over the tokens of `logits`."""
    sites = find_sites(model)
    shape = (len(sites), sites[0].num_heads)
    samples = np.random.default_rng(seed).lognormal(size=(9, *shape))
    moments = {metric: Moments.of(torch.tensor(samples**n)) for n, metric in enumerate(metrics, 1)}
    found = None
    if vectors:
        z = inputs(model, logits)
        z = torch.stack(
            [z[row].double().flatten(0, 1).unflatten(-1, (shape[1], -1)) for row in range(shape[0])], 1
        )
        weight = torch.stack(
            [(s.module.weight if isinstance(s.module, nn.Linear) else s.module.weight.T) for s in sites]
        )
        weight = weight.detach().double().unflatten(-1, z.shape[2:])
        power = torch.einsum("lohd,tlhd->tlho", weight, z).square().sum(-1).mean(0)
        count = np.full(shape, len(z))
        found = MeanVectors(
            count, 0 * count, z.mean(0).numpy(), power.numpy(), z.square().sum(-1).mean(0).numpy()
        )
    about = [
        {"name": s.name, "layer": s.layer, "num_heads": s.num_heads, "head_dim": s.head_dim} for s in sites
    ]
    metadata = {"model": "m", "sites": about, "token_agg": "token", "precision": "exact"}
    metadata |= {"weights": fingerprint(model), "data": {"source": "a.txt", "sha256": "0" * 64}}
    return HeadProfile(moments, metadata, found)


def plain(folder):
    """The model as a user of transformers loads it."""
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral", "olmo2", "gpt2", "phi", "opt"])
def test_zeroed_heads_equal_columns_zeroed_by_hand(family, tmp_path):
    model = make(family)
    before = logits(model)
    write_pruned(model, PruningPlan(HEADS), tmp_path / "out")
    reloaded = plain(tmp_path / "out")
    assert reloaded.dtype == model.dtype
    exact = 1e-12 if model.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(logits(reloaded), silenced(model, HEADS), rtol=0, atol=exact)
    assert (logits(reloaded) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    assert PruningPlan.load(tmp_path / "out" / "pruning_plan.json") == PruningPlan(HEADS)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, reloaded)]
    assert count[0] == count[1]


@pytest.mark.parametrize("family", UNIFORM)
def test_cut_kv_groups_equal_the_big_model_with_those_heads_zeroed(family, tmp_path):
    model = make(family)
    write_pruned(model, PruningPlan(GROUPS, uniform=True), tmp_path / "out")
    reloaded = plain(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), silenced(model, GROUPS), rtol=0, atol=1e-10)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    for site, was in zip(find_sites(reloaded), find_sites(model), strict=True):
        assert (site.num_heads, site.head_dim) == (2, was.head_dim)
    hidden, head_dim = 64, find_sites(model)[0].head_dim
    biases = {"qwen2": 4, "llama-bias": 4}.get(family, 0) * head_dim  # of q, k and v: 2, 1 and 1 heads less
    cut = 3 * (6 * head_dim * hidden + biases)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in reloaded.parameters()) == cut


def test_cut_weights_are_the_rows_and_columns_of_the_heads_that_stay():
    model = make("qwen2")
    cut = pruned_copy(model, PruningPlan(GROUPS, uniform=True))
    for layer, heads, groups in ((0, [2, 3], [1]), (1, [0, 1], [0]), (2, [2, 3], [1])):
        old, new = model.model.layers[layer].self_attn, cut.model.layers[layer].self_attn
        for name, stay in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
            for entry in ("weight", "bias"):
                parts = getattr(getattr(old, name), entry).unflatten(0, (-1, 16))
                assert torch.equal(getattr(getattr(new, name), entry), torch.cat([parts[n] for n in stay]))
        columns = old.o_proj.weight.unflatten(1, (-1, 16))
        assert torch.equal(new.o_proj.weight, torch.cat([columns[:, n] for n in heads], 1))


@pytest.mark.parametrize(
    "family, heads, uniform",
    [
        ("llama", HEADS, False),
        ("llama", GROUPS, True),
        ("llama-bias", HEADS, False),
        ("gemma3", GROUPS, True),
        ("starcoder2", HEADS, False),
        ("gpt2", HEADS, False),
        ("phi", HEADS, False),
    ],
)
def test_means_become_a_bias(family, heads, uniform, tmp_path):
    model = make(family)
    profile = profile_of(model)
    plan = PruningPlan(heads, mode="mean", uniform=uniform)
    write_pruned(model, plan, tmp_path / "out", profile=profile)
    expected = silenced(model, heads, profile.vectors.mean)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=0, atol=1e-9)
    assert (expected - silenced(model, heads)).abs().max() > 1e-4


def test_a_stored_dtype_loses_nothing_but_of_biases(tmp_path):
    model = build("llama").bfloat16().float()
    profile = profile_of(model)
    write_pruned(model, PruningPlan(HEADS), tmp_path / "zero", stored_dtype=torch.bfloat16)
    found = plain(tmp_path / "zero")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(logits(found.float()), silenced(model, HEADS), rtol=0, atol=1e-5)
    write_pruned(
        model,
        PruningPlan(HEADS, mode="mean"),
        tmp_path / "mean",
        profile=profile,
        stored_dtype=torch.bfloat16,
    )
    assert plain(tmp_path / "mean").dtype == torch.bfloat16
    with torch.no_grad():
        model.model.norm.weight[0] = 1 + 2**-20
    write_pruned(model, PruningPlan(HEADS), tmp_path / "wide", stored_dtype=torch.bfloat16)
    assert plain(tmp_path / "wide").dtype == torch.float32


def test_before_and_after_are_compared():
    model = build("llama")
    cut = pruned_copy(model, PruningPlan(GROUPS, uniform=True))
    rows = list(tokens(3, 10))
    found = compare_models(model, cut, rows, rounds=2)
    losses = []
    for of in (model, cut):
        log = torch.log_softmax(of(torch.stack(rows)).logits[:, :-1].detach().double(), -1)
        losses.append(-log.gather(-1, torch.stack(rows)[:, 1:, None]).squeeze(-1).mean(1))
    assert found.loss == pytest.approx([float(x.mean()) for x in losses], abs=1e-5)
    rise = losses[1] - losses[0]
    assert found.rise == pytest.approx(float(rise.mean()), abs=1e-5)
    assert found.rise_sem == pytest.approx(float(rise.std() / 3**0.5), abs=1e-5)
    assert found.parameters == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in cut.parameters()),
    )
    assert len(found.speed_ratios) == 2 and found.speed_ratio > 0


# ---------------------------------------------------------------- the choice


def test_the_lowest_heads_of_a_profile():
    model = build("llama")
    profile = profile_of(model)
    plan = plan_pruning(profile, model, 0.25)
    values = profile.statistics(RATIO_METRIC)["mean"]
    lowest = np.argsort(values.flatten())[:3]
    assert plan.heads == tuple(sorted((int(n) // 4, int(n) % 4) for n in lowest))
    assert (plan.metric, plan.mode, plan.model) == (RATIO_METRIC, "zero", "m")
    assert plan.weights == fingerprint(model) and plan.data["source"] == "a.txt"


@pytest.mark.parametrize("group_by", ["sum", "max"])
def test_uniform_takes_the_lowest_groups_of_each_layer(group_by):
    model = build("llama")
    plan = plan_pruning(profile_of(model, seed=4), model, 0.5, uniform=True, group_by=group_by)
    values = profile_of(model, seed=4).statistics(RATIO_METRIC)["mean"].reshape(3, 2, 2)
    groups = [(layer, int(np.argmin(getattr(values[layer], group_by)(-1)))) for layer in range(3)]
    assert plan.kv_groups == tuple(groups)
    assert plan.heads == tuple((layer, 2 * group + n) for layer, group in groups for n in (0, 1))
    assert plan.options == {"fraction": 0.5, "group_by": group_by}


def test_sum_and_max_choose_other_groups_where_they_differ():
    model = build("llama")
    chosen = {
        group_by: {
            seed: plan_pruning(
                profile_of(model, seed=seed), model, 0.5, uniform=True, group_by=group_by
            ).kv_groups
            for seed in range(6)
        }
        for group_by in ("sum", "max")
    }
    assert chosen["sum"] != chosen["max"]


def test_a_metric_of_kv_groups_ranks_them_itself():
    model = build("llama")
    profile = profile_of(model, (KV_METRIC,))
    plan = plan_pruning(profile, model, 0.5, metric=KV_METRIC, uniform=True)
    values = profile.statistics(KV_METRIC)["mean"][:, :2]
    assert plan.kv_groups == tuple((layer, int(n)) for layer, n in enumerate(values.argmin(1)))
    with pytest.raises(OptionError, match="needs uniform"):
        plan_pruning(profile, model, 0.5, metric=KV_METRIC)


def test_means_are_ranked_by_their_error():
    model = build("llama")
    profile = profile_of(model, (RATIO_METRIC, METRICS[1]))
    plan = plan_pruning(profile, model, 0.25, mode="mean")
    assert plan.metric == "mean-ablation error per residual"
    assert plan.heads == tuple(sorted(profile.lowest(0.25, mode="mean", model=model)))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"fraction": 0}, OptionError, "between 0 and 1, not 0"),
        ({"fraction": 0.01}, OptionError, "0.01 of 12 heads is none"),
        ({"fraction": 0.1, "uniform": True}, OptionError, "choose one of 0.5"),
        ({"metric": "head_residual"}, OptionError, "no metric 'head_residual'"),
        ({"group_by": "mean", "uniform": True}, OptionError, "unknown group_by 'mean'"),
    ],
)
def test_choices_that_cannot_be_made(changes, error, message):
    model = build("llama")
    with pytest.raises(error, match=message):
        plan_pruning(profile_of(model), model, **({"fraction": 0.5} | changes))


def test_a_profile_or_plan_of_another_model_is_refused():
    model, other = build("llama"), build("llama", seed=1)
    plan = plan_pruning(profile_of(model), model, 0.5)
    with pytest.raises(PlanError, match="the numbers are not"):
        pruned_copy(other, plan)
    with pytest.raises(ResultsError, match="not of these weights"):
        plan_pruning(profile_of(model), other, 0.5)
    with pytest.raises(ResultsError, match="of another model than Gemma"):
        plan_pruning(profile_of(model), build("gemma2", num_hidden_layers=2), 0.5)
    profile = profile_of(model)
    del profile.metadata["weights"]
    with pytest.raises(ResultsError, match="no fingerprint"):
        plan_pruning(profile, model, 0.5)


# ---------------------------------------------------------------- files of plans


def test_a_plan_survives_its_file(tmp_path):
    model = build("llama")
    plan = plan_pruning(profile_of(model), model, 0.5, uniform=True)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    (tmp_path / "list.json").write_text("[[2, 1], [0, 3]]")
    assert PruningPlan.load(tmp_path / "list.json") == PruningPlan([(0, 3), (2, 1)])


def test_a_list_of_heads_is_filled_in():
    model = build("llama")
    plan = PruningPlan([(0, 0), (0, 1), (2, 1)]).filled_in(model)
    assert (plan.kv_groups, plan.weights) == (((0, 0),), fingerprint(model))
    with pytest.raises(PlanError, match="the numbers are not"):
        plan.filled_in(build("llama", seed=1))


def lies():
    good = json.loads(PruningPlan(HEADS).to_json())
    yield "[]", "names no heads"
    yield "", "Expecting value"
    yield "\xff", "no pruning plan"
    yield "[" * 100_000, "nested too deeply"
    yield "[[0, NaN]]", "NaN"
    yield f"[[0, {'9' * 5000}]]", "no pruning plan"
    yield "{}", "neither an object of the format"
    yield "7", "neither an object of the format"
    for heads in (
        [[0]],
        [0, 1],
        [[0, -1]],
        [[0, True]],
        [[0, 1.0]],
        [["0", 1]],
        [[0, 2**40]],
        {"0": 1},
        None,
    ):
        yield json.dumps(good | {"heads": heads}), "heads must be"
    yield json.dumps(good | {"heads": [[0, 1], [0, 1]]}), "twice"
    for key, value in (
        ("version", 2),
        ("version", True),
        ("mode", "half"),
        ("mode", ["zero"]),
        ("uniform", 1),
    ):
        yield json.dumps(good | {key: value}), key
    for key in ("metric", "model", "weights", "data"):
        yield json.dumps(good | {key: 3}), f"{key} must be"
    yield json.dumps(good | {"options": []}), "options must be"
    del good["data"]
    yield json.dumps(good), "lacks data"


@pytest.mark.parametrize("content, message", list(lies()))
def test_a_damaged_plan_is_refused(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(PlanError, match="is no pruning plan") as caught:
        PruningPlan.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "heads, message", [([(9, 0)], "no head 0 in layer 9"), ([(0, 4)], "no head 4 in layer 0")]
)
def test_heads_that_the_model_has_not(heads, message):
    with pytest.raises(PlanError, match=message):
        pruned_copy(build("llama"), PruningPlan(heads))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3"])
def test_means_need_a_bias_that_the_class_can_hold(family, tmp_path):
    model = make(family)
    plan = PruningPlan(HEADS, mode="mean")
    if family == "gemma3":  # it can
        assert all(
            site.module.bias is not None
            for site in find_sites(pruned_copy(model, plan, profile=profile_of(model)))
        )
        return
    with pytest.raises(PruningError, match="have no bias, and its configuration cannot give them one"):
        write_pruned(model, plan, tmp_path / "out", profile=profile_of(model))
    assert list(tmp_path.iterdir()) == []


def test_means_need_a_profile_with_mean_vectors():
    model = build("llama")
    with pytest.raises(OptionError, match="needs profile="):
        pruned_copy(model, PruningPlan(HEADS, mode="mean"))
    with pytest.raises(ResultsError, match="no mean vectors"):
        pruned_copy(model, PruningPlan(HEADS, mode="mean"), profile=profile_of(model, vectors=False))


@pytest.mark.parametrize(
    "family, message",
    [
        ("gpt2", "no separate q_proj, k_proj, v_proj"),
        ("opt", "no num_key_value_heads|cannot be cut|does not say|cannot be built"),
        ("olmo2", r"q_norm.weight \[32\] where the pruned weight is \[64\]: it cannot be cut"),
        ("gpt-oss", "sinks"),
    ],
)
def test_layouts_that_cannot_be_cut_are_refused_by_name(family, message):
    model = make(family)
    groups = GROUPS if family in ("olmo2", "gpt-oss") else [(0, 1), (1, 0), (2, 2)]
    with pytest.raises((PruningError, OptionError), match=message):
        pruned_copy(model, PruningPlan(groups, uniform=True))


@pytest.mark.parametrize(
    "heads, message",
    [
        ([(0, 0), (1, 0), (2, 0)], "not whole KV groups"),
        (GROUPS[:4], "as many KV groups must be cut in each layer"),
        ([(layer, head) for layer in range(3) for head in range(4)], "no KV group is left"),
    ],
)
def test_uniform_needs_as_many_whole_groups_in_each_layer(heads, message):
    with pytest.raises(OptionError, match=message):
        pruned_copy(build("llama"), PruningPlan(heads, uniform=True))


def test_a_class_that_refuses_the_number_of_heads_is_quoted():
    model = build("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    heads = [(layer, head) for layer in range(3) for head in (0, 1)]  # 6 heads do not divide 64
    with pytest.raises(PruningError, match="cannot be built with num_attention_heads 6.*not a multiple"):
        pruned_copy(model, PruningPlan(heads, uniform=True))


def test_foreign_weights_are_refused_by_name():
    model = build("llama")
    shared = copy.deepcopy(model)
    shared.model.layers[1].self_attn.o_proj.weight = shared.model.layers[0].self_attn.o_proj.weight
    with pytest.raises(PruningError, match="several modules share its weight"):
        pruned_copy(shared, PruningPlan(HEADS))
    computed = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(computed.model.layers[0].self_attn.o_proj)
    with pytest.raises(PruningError, match="layers.0.self_attn.o_proj .* has no plain weight"):
        pruned_copy(computed, PruningPlan(HEADS))
    quantized = copy.deepcopy(model)
    quantized.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PruningError, match=r"is quantized \(fp8\)"):
        pruned_copy(quantized, PruningPlan(HEADS))
    with pytest.raises(PruningError, match="is offloaded, or not loaded"):
        pruned_copy(copy.deepcopy(model).to("meta"), PruningPlan(HEADS))
    own = copy.deepcopy(model)
    own.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(PruningError, match="Mine of .* is no model of transformers"):
        pruned_copy(own, PruningPlan(HEADS))


def test_models_that_are_split_over_ranks_are_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(pruning, "is_dtensor", lambda tensor: tensor.dim() == 2)
    with pytest.raises(PruningError, match="embed_tokens.weight is split over ranks"):
        pruned_copy(model, PruningPlan(HEADS))


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(PruningError, match="has adapters: merge them first"):
        pruned_copy(model, PruningPlan(HEADS))


# ---------------------------------------------------------------- the folder


def test_a_folder_that_is_not_empty_is_kept(tmp_path):
    model, out = build("llama"), tmp_path / "out"
    out.mkdir()
    write_pruned(model, PruningPlan(HEADS[:1]), out)  # empty
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(OptionError, match="is not empty"):
        write_pruned(model, PruningPlan(HEADS), out)
    assert (out / "model.safetensors").read_bytes() == first
    write_pruned(model, PruningPlan(HEADS), out, force=True)
    assert (out / "model.safetensors").read_bytes() != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(OptionError, match="holds no model"):
        write_pruned(model, PruningPlan(HEADS), tmp_path / "mine", force=True)
    with pytest.raises(NotADirectoryError):
        write_pruned(model, PruningPlan(HEADS), out / "config.json", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "mine"}


@pytest.mark.parametrize("fails", ["_reloaded", "_check_weights", "_check_logits", "_put"])
def test_the_folder_appears_whole_or_not_at_all(fails, tmp_path, monkeypatch):
    model, out = build("llama"), tmp_path / "out"
    write_pruned(model, PruningPlan(HEADS[:1]), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruned_folder, fails, fail)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_pruned(model, PruningPlan(HEADS), folder, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model = build("llama")
    wrong = pruned_copy(model, PruningPlan(HEADS[1:]))
    monkeypatch.setattr(pruned_folder, "pruned_copy", lambda *_, **__: wrong)
    with pytest.raises(PruningError, match="computes something else than the model without these heads"):
        write_pruned(model, PruningPlan(HEADS), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_reloaded_otherwise_are_refused(tmp_path, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(pruned_folder, "_reloaded", lambda folder, model: model)
    with pytest.raises(PruningError, match="loads other weights than were saved, such as model.layers.0"):
        write_pruned(model, PruningPlan(HEADS), tmp_path / "out")
