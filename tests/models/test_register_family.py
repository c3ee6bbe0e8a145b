"""Families that another package registers: a model whose attention and layers nobody here knows."""

import numpy as np
import pytest
import torch
from oracle import UPDATE_METRIC, assert_results, captured_inputs, dense_norms, statistics
from torch import nn

import fastheads
from fastheads import Family, HeadProfile, HookManager, NoSitesError, find_sites, register_family
from fastheads.basic import HookManager as BasicHookManager
from fastheads.cli.commands import main
from fastheads.errors import OptionError
from fastheads.models import families

HEADS, DIM, HIDDEN, LAYERS, VOCAB = 4, 6, 20, 2, 31
MASK = [[0, 0, 1, 1, 1], [1] * 5]


class BranchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.eps = 1e-5

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class TokenBlender(nn.Module):
    """Attention: neither it, nor its projection, nor its attributes have names that are usual."""

    def __init__(self, sequence_first=False):
        super().__init__()
        self.lanes, self.sequence_first = HEADS, sequence_first
        self.into = nn.Linear(HIDDEN, 3 * HEADS * DIM)
        self.writer = nn.ModuleDict({"back": nn.Linear(HEADS * DIM, HIDDEN)})

    def forward(self, x, mask):
        batch, seq, _ = x.shape
        q, k, v = self.into(x).view(batch, seq, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / DIM**0.5
        allowed = torch.ones(seq, seq, dtype=torch.bool).tril() & (mask[:, None, None, :] != 0)
        allowed = allowed | torch.eye(seq, dtype=torch.bool)
        z = (scores.masked_fill(~allowed, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.sequence_first:
            return self.writer["back"](z.transpose(0, 1)).transpose(0, 1)
        return self.writer["back"](z)


class Stage(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blend = TokenBlender(**options)
        self.tamed = BranchNorm()
        self.strength = 0.25

    def forward(self, x, mask):
        return x + self.strength * self.tamed(self.blend(x, mask))


class Reader(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.stages = nn.ModuleList(Stage(**options) for _ in range(LAYERS))

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        for stage in self.stages:
            x = stage(x, attention_mask)
        return x


FACTS = dict(
    attention="^TokenBlender$",
    projection="writer.back",
    num_heads="lanes",
    layout="batch_first",
    layer="^Stage$",
    norm="tamed",
    multiplier="strength",
)


@pytest.fixture(autouse=True)
def none_registered(monkeypatch):
    monkeypatch.setattr(families, "_registered", {})
    monkeypatch.setattr(families, "_registered_found", families._no_classes())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Reader().eval()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (2, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.tensor(MASK)}


def updates(x, stage):
    """‖c diag(g) W_h z_h / rms(a)‖ `[batch, seq, heads]` in float64, a the projection's output."""
    back, norm = stage.blend.writer["back"], stage.tamed
    weight, gain = back.weight.double(), norm.weight.double()
    _, of_gained = dense_norms(x, gain[:, None] * weight, HEADS)
    rms = ((x @ weight.mT + back.bias.double()).square().mean(-1) + norm.eps).sqrt()
    return stage.strength * of_gained / rms[..., None].detach().numpy()


@pytest.mark.parametrize("manager", [HookManager, BasicHookManager])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_a_family_is_measured_as_the_oracle_says(model, manager, token_agg):
    register_family(Family("reader", **FACTS))
    sites = find_sites(model)
    assert [(s.name, s.layer, s.num_heads, s.head_dim) for s in sites] == [
        (f"stages.{n}.blend.writer.back", n, HEADS, DIM) for n in range(LAYERS)
    ]
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(model, token_agg) as hooks,
        torch.no_grad(),
    ):
        model(**batch(0))
        model(**batch(1))
        results = hooks.get_results()
    assert_results(results, sites, inputs, [MASK, MASK], token_agg, rtol=1e-5)
    for row, stage in enumerate(model.stages):
        samples = []
        for x in inputs[row]:
            for values, mask in zip(updates(x, stage), MASK, strict=True):
                real = values[np.array(mask) != 0]
                samples.append(
                    {"last": real[-1:], "all": real.mean(0, keepdims=True), "token": real}[token_agg]
                )
        for statistic, want in statistics(np.concatenate(samples)).items():
            got = results[UPDATE_METRIC][statistic][row].numpy()
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-9, err_msg=statistic)


def test_profile_save_load_merge_show(model, tmp_path, capsys):
    register_family(Family("reader", **FACTS))
    parts = [fastheads.profile(model, [batch(n)], token_agg="all") for n in range(2)]
    whole = fastheads.profile(model, [batch(0), batch(1)], token_agg="all")
    paths = [str(tmp_path / f"{n}.fh") for n in range(2)]
    for part, path in zip(parts, paths, strict=True):
        part.save(path)
    merged = HeadProfile.merge([HeadProfile.load(path) for path in paths])
    for metric, statistics_ in whole.results().items():
        if metric != "metadata":
            for name, value in statistics_.items():
                torch.testing.assert_close(merged.results()[metric][name], value, equal_nan=True)
    assert merged.metadata["residual_update"] == "normed (BranchNorm), times 0.25"
    merged.save(tmp_path / "merged.fh")
    with pytest.raises(SystemExit) as exit_:
        main(["show", str(tmp_path / "merged.fh")])
    assert exit_.value.code == 0
    assert "Reader" in capsys.readouterr().out


def test_without_it_the_model_is_refused_by_name(model):
    with pytest.raises(NoSitesError, match="Reader"):
        HookManager(model)


def test_the_usual_checks_hold_for_it(model):
    register_family(Family("reader", **FACTS))
    with HookManager(model, verify=True) as hooks, torch.no_grad():
        model(**batch())
        assert {finding.error < 1e-4 for finding in hooks.findings.values()} == {True}


@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", None])
def test_a_layout(layout):
    """Only where it is known may a batch have as many rows as tokens."""
    torch.manual_seed(0)
    model = Reader(sequence_first=layout == "sequence_first").eval()
    register_family(Family("reader", **{**FACTS, "layout": layout}))
    square = {
        "input_ids": torch.arange(9).view(3, 3),
        "attention_mask": torch.tensor([[0, 1, 1]] + [[1] * 3] * 2),
    }
    sites = find_sites(model)
    with captured_inputs([s.module for s in sites]) as inputs, HookManager(model, "token") as hooks:
        if layout is None:
            with pytest.raises(fastheads.FastheadsError, match="cannot be told apart"), torch.no_grad():
                model(**square)
            return
        with torch.no_grad():
            model(**square)
        results = hooks.get_results()
    if layout == "sequence_first":
        inputs = [[x.transpose(0, 1) for x in of_site] for of_site in inputs]
    masks = [square["attention_mask"].tolist()]
    assert_results(results, sites, inputs, masks, "token", rtol=1e-5)


def test_a_forward_that_somebody_replaced_has_no_known_layout(model, monkeypatch):
    register_family(Family("reader", **FACTS))
    forward = TokenBlender.forward
    exec_in_another_module = {"__name__": "other", "forward": forward}
    exec("def replaced(self, *args):\n    return forward(self, *args)", exec_in_another_module)
    monkeypatch.setattr(TokenBlender, "forward", exec_in_another_module["replaced"])
    square = {"input_ids": torch.arange(9).view(3, 3), "attention_mask": torch.ones(3, 3)}
    with HookManager(model), pytest.raises(fastheads.FastheadsError, match="cannot be told apart"):
        model(**square)


class Beside(nn.Module):
    """A stage whose projection is beside the attention."""

    def __init__(self):
        super().__init__()
        self.core, self.out = nn.Identity(), nn.Linear(HEADS * DIM, HIDDEN)
        self.core.__class__ = type("BesideCore", (nn.Identity,), {})

    def forward(self, x):
        return x + self.out(self.core(x.repeat(1, 1, 2)[..., : HEADS * DIM]))


def test_a_projection_beside_the_attention():
    model = nn.Sequential(Beside(), Beside())
    register_family(
        Family("beside", attention="^BesideCore$", projection="../out", head_dim=DIM, layer="^Beside$")
    )
    with HookManager(model) as hooks, torch.no_grad():
        model(torch.randn(2, 5, HIDDEN))
        results = hooks.get_results()
    assert [(s.name, s.num_heads) for s in hooks.sites] == [("0.out", HEADS), ("1.out", HEADS)]
    assert results["metadata"]["residual_update"] == "as it is"


def test_kv_heads(model):
    model.stages[0].blend.shared = model.stages[1].blend.shared = 2
    register_family(Family("reader", **FACTS, num_kv_heads="shared"))
    sites = find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        HookManager(model, "token", kv_groups=True) as hooks,
        torch.no_grad(),
    ):
        model(**batch())
        mean = hooks.get_results()["kv_group_residual_contribution_norm"]["mean"]
    for row, site in enumerate(sites):
        _, norms = dense_norms(inputs[row][0], site.module.weight, 2)
        want = norms[np.array(MASK) != 0].mean(0)
        np.testing.assert_allclose(mean[row, :2].numpy(), want, rtol=1e-5)


# ---------------------------------------------------------------- what does not fit


def refused(model, says, **changes):
    register_family(Family("reader", **{**FACTS, **changes}))
    with pytest.raises(OptionError, match=says):
        HookManager(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(projection="writer.out"), "'reader'.*writer.out.*stages.0.blend.*no linear layer"),
        (dict(num_heads="n_lanes"), "'reader'.*n_lanes.*TokenBlender has not"),
        (dict(num_heads="writer"), "writer of a TokenBlender must be a positive whole number"),
        (dict(norm="calmed"), "'reader'.*calmed.*Stage has not"),
        (dict(norm="strength"), "strength of a Stage is no module"),
        (dict(multiplier="power"), "'reader'.*power.*Stage has not"),
    ],
)
def test_a_family_that_does_not_fit_the_model(model, changes, says):
    refused(model, says, **changes)


@pytest.mark.parametrize(
    "changes", [dict(num_heads=5), dict(head_dim=7), dict(head_dim=12), dict(num_heads=48)]
)
def test_a_number_of_heads_that_the_width_contradicts(model, changes):
    register_family(Family("reader", **{**FACTS, **changes}))
    with pytest.raises(NoSitesError, match="unknown or ambiguous.*by its family 'reader'"):
        find_sites(model)


def test_an_update_through_what_the_family_does_not_name_stays_unknown(model):
    register_family(
        Family("reader", **{k: v for k, v in FACTS.items() if k not in ("layer", "norm", "multiplier")})
    )
    with HookManager(model) as hooks, torch.no_grad():
        model(**batch())
        results = hooks.get_results()
    assert "Stage" in str(results["metadata"]["residual_update"])
    assert results[UPDATE_METRIC]["count"].sum() == 0


class WithTwo(nn.Module):
    eps = 1e-5

    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(HIDDEN, eps=1e-5), nn.RMSNorm(HIDDEN, 1e-5, elementwise_affine=False)]
)
def test_norms_of_torch(model, norm):
    register_family(Family("reader", **FACTS))
    model.stages[0].tamed = norm
    weight = model.stages[0].blend.writer["back"].weight
    with (
        captured_inputs([model.stages[0].blend.writer["back"]]) as inputs,
        HookManager(model, "token") as hooks,
        torch.no_grad(),
    ):
        model(**batch())
        mean = hooks.get_results()[UPDATE_METRIC]["mean"][0]
    x = inputs[0][0]
    _, norms = dense_norms(x, weight, HEADS)
    output = x @ weight.double().mT + model.stages[0].blend.writer["back"].bias.double()
    rms = (output.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = (0.25 * norms / rms.detach().numpy())[np.array(MASK) != 0].mean(0)
    np.testing.assert_allclose(mean.numpy(), want, rtol=2e-5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(HIDDEN),
        nn.LayerNorm(HIDDEN, elementwise_affine=False),
        WithTwo(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Softmax(dim=-1),
    ],
)
def test_a_norm_that_is_no_rms_norm(model, norm):
    register_family(Family("reader", **FACTS))
    model.stages[0].tamed = norm
    with HookManager(model) as hooks:
        described = hooks.to_profile().metadata["residual_update"]
    assert type(norm).__name__ in described[0] and described[1] == "normed (BranchNorm), times 0.25"


def test_no_two_entries_of_the_table_have_one_name():
    names = [family.name for family in families.FAMILIES]
    assert len(names) == len(set(names))


def test_a_family_that_is_registered_after_a_first_look(model):
    register_family(Family("other", attention="^Other$", num_heads=2))
    with pytest.raises(NoSitesError):
        find_sites(model)
    register_family(Family("reader", **FACTS))
    assert len(find_sites(model)) == LAYERS


def test_two_families_for_one_class(model):
    register_family(Family("reader", **FACTS))
    register_family(Family("blender", attention="Blender", projection="into"))
    with pytest.raises(OptionError, match="'reader' and 'blender'"):
        find_sites(model)


def test_a_name_is_given_once():
    register_family(Family("reader", **FACTS))
    register_family(Family("reader", **FACTS))
    with pytest.raises(OptionError, match="'reader' is known already, with another norm, multiplier"):
        register_family(Family("reader", **{**FACTS, "norm": None, "multiplier": None}))
    with pytest.raises(OptionError, match="'gemma' is known already"):
        register_family(Family("gemma", attention="^Reader"))


def test_refusals_of_transformers_stay():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    bloom = BloomForCausalLM(config)
    register_family(Family("mine", attention="^BloomAttention$", num_heads=2))
    with pytest.raises(NoSitesError, match="slow_but_exact"):
        find_sites(bloom)


def test_a_family_may_be_refused(model):
    register_family(
        Family("reader", attention="^TokenBlender$", projection="writer.back", refused="it is a toy")
    )
    with pytest.raises(NoSitesError, match="TokenBlender.*it is a toy"):
        find_sites(model)


@pytest.mark.parametrize("nonsense", [None, "reader", FACTS, Family])
def test_no_family(nonsense):
    with pytest.raises(OptionError, match=r"fastheads\.Family"):
        register_family(nonsense)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (dict(name=""), "name"),
        (dict(name=3), "name"),
        (dict(attention=None, layer=None), "attention=, layer= or decoder="),
        (dict(rows_of_ids=2), "rows_of_ids needs decoder="),
        (dict(decoder="^D", rows_of_ids=0), "rows_of_ids must be a positive"),
        (dict(attention="("), "attention must be a pattern"),
        (dict(attention=""), "not all"),
        (dict(attention=".*"), "not all"),
        (dict(attention=nn.Linear), "attention must be a pattern"),
        (dict(layer="(x)?"), "layer must be a pattern"),
        (dict(package=None), "package"),
        (dict(projection=""), "projection must be a path"),
        (dict(projection="../../out"), "projection must be a path"),
        (dict(projection="writer back"), "projection must be a path"),
        (dict(num_heads=0), "num_heads must be a positive"),
        (dict(num_heads=True), "num_heads must be a positive"),
        (dict(num_heads=2.0), "num_heads must be a positive"),
        (dict(head_dim="a-b"), "head_dim must be a positive"),
        (dict(num_kv_heads=-1), "num_kv_heads must be a positive"),
        (dict(heads_per_unit="two"), "heads_per_unit must be a positive"),
        (dict(layout="sbh"), "layout must be one of batch_first, sequence_first"),
        (dict(norm=nn.LayerNorm(3)), "norm must be the name"),
        (dict(multiplier=0.5), "multiplier must be the name"),
        (dict(child="self attn"), "child must be the name"),
        (dict(refused=""), "refused must be a reason"),
        (dict(refused_if=lambda owner: True), "needs refused="),
        (dict(refused="so", refused_if=True), "refused_if must be a function"),
        (dict(update_unknown=1), "update_unknown must be a reason"),
        (dict(attention=None), "projection needs attention="),
        (dict(layer=None), "norm needs layer="),
    ],
)
def test_nonsense(facts, says):
    with pytest.raises(OptionError, match=says):
        Family(**{"name": "reader", **FACTS, **facts})
