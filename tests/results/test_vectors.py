"""Mean vectors of profiles against dense algebra in float64 over all tokens, and in files that lie."""

import dataclasses
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed_files import read, resealed
from tiny_models import build

from fastheads.errors import (
    DataError,
    MergeError,
    OptionError,
    ProfileError,
    ProfileFileError,
    ResultsError,
    UnsupportedWeightError,
)
from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe, kv_heads_of
from fastheads.models.residual import UnknownUpdateError, update_of
from fastheads.models.sites import find_sites
from fastheads.results import vectors as vectors_of_models
from fastheads.results.head_profile import FILE_KEY, HeadProfile
from fastheads.results.mean_vectors import NAMES, MeanVectors
from fastheads.results.vectors import EXACT_ERROR, FAST_ERROR, RATIO_METRIC
from fastheads.stats.mean_vectors import RunningMeanVectors, merged_buffers
from fastheads.stats.metrics import METRICS
from fastheads.stats.moments import Moments

CONTRIBUTION = METRICS[1]


def weights_of(model):
    """W_h of each site: float64 `[heads, hidden, head_dim]`."""
    return [
        site.module.weight.detach().double().unflatten(1, (site.num_heads, -1)).transpose(0, 1)
        for site in find_sites(model)
    ]


def drawn(model, seed=0, tokens=(7, 12), spread=1.0, offset=1.0):
    """Outputs z of each site in two calls with a mask: a list of `(z by site [B, S, H, D], valid [B, S])`, float64."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for seq in tokens:
        valid = torch.rand(2, seq, generator=generator) < 0.7
        valid[:, 0] = True
        z = [
            offset
            * torch.randn(
                s.num_heads,
                s.head_dim,
                dtype=torch.float64,
                generator=torch.Generator().manual_seed(99),
            )
            + spread * torch.randn(2, seq, s.num_heads, s.head_dim, dtype=torch.float64, generator=generator)
            for s in find_sites(model)
        ]
        for of_site in z:
            of_site[~valid] = math.nan
        calls.append((z, valid))
    return calls


def valid_tokens(calls, row):
    return torch.cat([z[row][valid] for z, valid in calls])  # [n, H, D]


def contributions(z, weight):
    """W_h z_h `[n, H, hidden]`."""
    return torch.einsum("hod,nhd->nho", weight, z)


def profile_of(model, calls, *, precision="exact", weights=True, ratio=True, rows=None, noise=0.0, **changes):
    """A profile under token_agg "token" as a run over these outputs makes it. Norms are wrong by up to `noise`."""
    sites, dense = find_sites(model), weights_of(model)
    heads, head_dim = max(s.num_heads for s in sites), max(s.head_dim for s in sites)
    state = RunningMeanVectors(len(sites), heads, head_dim, torch.device("cpu"))
    samples = torch.full((sum(int(v.sum()) for _, v in calls), len(sites), heads), math.nan)
    present = torch.zeros(len(sites), heads, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    samples = samples.double()
    for row, site in enumerate(sites):
        if rows is not None and row not in rows:
            continue
        present[row, : site.num_heads] = True
        norms = contributions(valid_tokens(calls, row), dense[row]).norm(dim=-1)
        samples[:, row, : site.num_heads] = norms
        for z, valid in calls:
            power = torch.full((1, *z[row].shape[:3]), math.nan, dtype=torch.float64)
            norm = contributions(z[row][valid], dense[row]).norm(dim=-1)
            wrong = 1 + noise * (2 * torch.rand(norm.shape, generator=generator, dtype=torch.float64) - 1)
            power[0, valid] = (norm * wrong).square()
            state.update([row], z[row].flatten(0, 1)[None], power.flatten(1, 2), valid.flatten())

    def moments(values):
        found = Moments.of(values)
        for plane, empty in zip(found, (0, 0, 0.0, 0.0, math.inf, -math.inf), strict=True):
            plane[~present] = empty
        return found

    by_metric = {CONTRIBUTION: moments(samples)}
    if ratio:
        by_metric[RATIO_METRIC] = moments(samples / 3 + 0.1)
    about = describe(
        model,
        sites,
        kv_heads_of(model, sites),
        token_agg="token",
        skip_first=0,
        precision=precision,
        backend="factored",
    )
    about["layers"] = None if rows is None else list(rows)
    about["residual_update"] = [said(model, site) for site in sites]
    about["weights"] = fingerprint(model) if weights is True else weights
    return HeadProfile(by_metric, about | changes, MeanVectors.of(state.views()))


def said(model, site):
    try:
        return str(update_of(model, site))
    except UnknownUpdateError as error:
        return str(error)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def calls(model):
    return drawn(model)


@pytest.fixture(scope="module")
def good(model, calls):
    return profile_of(model, calls)


def truth(model, calls):
    """Mean of ‖W z‖², W z̄, and tr(W Cov Wᵀ) by the definition, for each site."""
    for row, weight in enumerate(weights_of(model)):
        z = valid_tokens(calls, row)
        written = contributions(z, weight)
        centred = z - z.mean(0)
        cov = torch.einsum("nhd,nhe->hde", centred, centred) / len(z)
        trace = torch.einsum("hod,hde,hoe->h", weight, cov, weight)
        yield written.square().sum(-1).mean(0), written.mean(0), trace


# ---------------------------------------------------------------- what they say with the model


def test_constant_share_and_error_are_those_of_the_definition(model, calls, good):
    share, error = good.constant_share(model), good.mean_ablation_error(model)
    assert share.shape == error.shape == good.shape and share.dtype == error.dtype == torch.float64
    for row, (power, mean, trace) in enumerate(truth(model, calls)):
        torch.testing.assert_close(share[row], mean.square().sum(-1) / power, rtol=1e-12, atol=0)
        torch.testing.assert_close(error[row], trace, rtol=1e-12, atol=0)


def test_error_per_residual(model, calls, good):
    found = good.mean_ablation_error_ratio(model)
    stats = good.results()
    for row, (_, _, trace) in enumerate(truth(model, calls)):
        want = trace.sqrt() * stats[RATIO_METRIC]["mean"][row] / stats[CONTRIBUTION]["mean"][row]
        torch.testing.assert_close(found[row], want, rtol=1e-12, atol=0)


def test_a_missing_metric_is_named(model, calls):
    profile = profile_of(model, calls, ratio=False)
    with pytest.raises(ResultsError, match=f"lacks {RATIO_METRIC}, which"):
        profile.mean_ablation_error_ratio(model)
    moments = {METRICS[0]: profile.moments[CONTRIBUTION]}
    neither = HeadProfile(moments, profile.metadata, profile.vectors)
    with pytest.raises(ResultsError, match=f"lacks {RATIO_METRIC} and {CONTRIBUTION}, which"):
        neither.mean_ablation_error_ratio(model)


@pytest.mark.parametrize("noise", [0.0, 5e-6])
@pytest.mark.parametrize("offset", [1e-12, 1.0, 1e9])
def test_a_constant_head_has_no_error_that_rounding_made(model, offset, noise):
    profile = profile_of(model, drawn(model, spread=0.0, offset=offset), noise=noise)
    assert profile.mean_ablation_error(model).isnan().all()
    assert profile.mean_ablation_error_ratio(model).isnan().all()
    share = profile.constant_share(model)
    torch.testing.assert_close(share, torch.ones_like(share), rtol=2e-5, atol=0)
    assert (share <= 1).all()


@settings(max_examples=25, deadline=None)
@given(st.floats(-8, 1), st.integers(0, 1000), st.sampled_from(["exact", "fast"]))
def test_a_small_error_is_right_to_rounding_or_nan(log_spread, seed, precision):
    model = build()
    calls = drawn(model, seed, spread=10**log_spread)
    noise = 5e-6 if precision == "exact" else FAST_ERROR
    found = profile_of(model, calls, noise=noise, precision=precision).mean_ablation_error(model)
    for row, ((power, _, trace), weight) in enumerate(
        zip(truth(model, calls), weights_of(model), strict=True)
    ):
        norm = torch.linalg.matrix_norm(weight, 2)
        output = valid_tokens(calls, row).square().sum(-1).mean(0)
        bound = 2.1 * EXACT_ERROR * norm * (power * output).sqrt()
        bound = bound if precision == "exact" else bound + 2.1 * FAST_ERROR * power
        known = ~found[row].isnan()
        assert (found[row][known] > 0).all()
        assert ((found[row] - trace).abs() <= bound)[known].all()
        assert known[trace > 2 * bound].all() and not known[trace < 1e-3 * bound].any()


def test_an_error_of_a_thousandth_is_no_rounding(model):
    calls = drawn(model, spread=0.03)
    found = profile_of(model, calls, noise=5e-6).mean_ablation_error(model)
    for row, (power, _, trace) in enumerate(truth(model, calls)):
        assert (trace < 3e-3 * power).all()
        torch.testing.assert_close(found[row], trace, rtol=0.02, atol=0)


def test_a_head_that_writes_nothing_has_an_error_of_0(calls):
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :24] = 0
    profile = profile_of(model, calls)
    assert profile.mean_ablation_error(model)[1, 0] == 0
    assert profile.mean_ablation_error_ratio(model)[1, 0] == 0
    assert profile.constant_share(model)[1, 0].isnan()
    assert (profile.mean_ablation_error(model)[1, 1:] > 0).all()


def test_powers_of_other_tokens_are_not_believed(model, good):
    """As if the mean vector and the power were of different tokens."""
    halved = HeadProfile(
        good.moments, good.metadata, dataclasses.replace(good.vectors, power=good.vectors.power * 0.01)
    )
    share, error = halved.constant_share(model), halved.mean_ablation_error(model)
    believed = good.constant_share(model) < 0.01
    assert torch.equal(share.isnan(), ~believed) and torch.equal(error.isnan(), ~believed)


def test_the_bias_is_what_the_heads_write_on_average(model, calls, good):
    biases = good.mean_bias(model, [(2, 3), (0, 1), (2, 0), (2, 3)])
    assert sorted(biases) == [0, 2]
    means = [mean for _, mean, _ in truth(model, calls)]
    torch.testing.assert_close(biases[0], means[0][1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(biases[2], means[2][0] + means[2][3], rtol=1e-12, atol=1e-14)
    assert good.mean_bias(model, []) == {}
    # The mean over tokens of the layer's output does not change.
    projection = find_sites(model)[2].module
    z = valid_tokens(calls, 2)
    zeroed = z.clone()
    zeroed[:, [0, 3]] = 0
    out, after = (x.flatten(1) @ projection.weight.double().T for x in (z, zeroed))
    torch.testing.assert_close((after + biases[2]).mean(0), out.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((3, 0), "no head 0 in layer 3"),
        ((0, 4), "no head 4 in layer 0"),
        ((0, -1), "no head -1 in layer 0"),
        ((0,), "pairs of whole numbers"),
        ((0, True), "pairs of whole numbers"),
        (7, "pairs of whole numbers"),
        ("01", "pairs of whole numbers"),
    ],
)
def test_other_heads_are_refused(model, good, pair, message):
    with pytest.raises(OptionError, match=message):
        good.mean_bias(model, [(0, 0), pair])


def test_heads_without_tokens(model, calls):
    profile = profile_of(model, calls, rows=[0, 2])
    for found in (profile.constant_share(model), profile.mean_ablation_error(model)):
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
    with pytest.raises(ResultsError, match="head 2 of layer 1 has no mean vector"):
        profile.mean_bias(model, [(0, 0), (1, 2)])
    assert profile.project([5], model=model)[1].isnan().all()


def test_two_projections_of_one_layer_are_ambiguous():
    model = build()
    model.model.layers[1].self_attn.layer_idx = 0
    profile = profile_of(model, drawn(model))
    with pytest.raises(OptionError, match="layer 0 has several.*layers.0.self_attn.*layers.1.self_attn"):
        profile.mean_bias(model, [(0, 0)])
    assert sorted(profile.mean_bias(model, [(2, 0)])) == [2]


def test_ragged_heads():
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    attention.num_key_value_groups = 1
    calls = drawn(model)
    profile = profile_of(model, calls)
    profile = HeadProfile._of_content(profile.to_bytes())
    share, error = profile.constant_share(model), profile.mean_ablation_error(model)
    assert share[1, 2:].isnan().all() and error[1, 2:].isnan().all()
    for row, (power, mean, trace) in enumerate(truth(model, calls)):
        heads = len(trace)
        torch.testing.assert_close(share[row, :heads], mean.square().sum(-1) / power, rtol=1e-12, atol=0)
        torch.testing.assert_close(error[row, :heads], trace, rtol=1e-12, atol=0)
    with pytest.raises(OptionError, match="no head 2 in layer 1"):
        profile.mean_bias(model, [(1, 2)])


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_project_on_given_directions(model, calls, good, dtype, tmp_path):
    directions = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = good.project(directions, model=model)
    assert found.shape == (3, 4, 5)
    for row, (_, mean, _) in enumerate(truth(model, calls)):
        torch.testing.assert_close(found[row], mean @ directions.double().T, rtol=1e-10, atol=1e-12)
    path = tmp_path / "d.safetensors"
    safetensors.torch.save_file({"anything": directions}, path)
    for name in (path, str(path)):
        assert torch.equal(good.project(name, model=model), found)


FINAL_NORMS = {"llama": "norm", "gemma": "norm", "starcoder2": "norm", "phi3": "norm", "cohere": "norm"}


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_project_on_tokens_is_what_reaches_their_logits(family):
    model = build(family).double()
    norm = getattr(model.model, FINAL_NORMS[family])
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + torch.rand(parameter.shape))
    profile = profile_of(model, drawn(model))
    ids = [3, 17, 99]
    found = profile.project(ids, model=model)
    for tokens in (tuple(ids), torch.tensor(ids), np.array(ids)):
        assert torch.equal(profile.project(tokens, model=model), found)
    # A stream x and the same with v added: the logits' difference before the norm's scale is the projection of v.
    x = torch.randn(64, dtype=torch.float64)
    gain = norm.weight.detach() + (1 if family == "gemma" else 0)
    centred = family in ("starcoder2", "cohere")
    rows = model.get_output_embeddings().weight.detach()[ids] * gain
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    scale = (x - x.mean()).square().mean().sqrt() if centred else x.square().mean().sqrt()
    with torch.no_grad():
        logits = model.get_output_embeddings()(norm(x) - norm(torch.zeros_like(x)))[ids]
    torch.testing.assert_close(rows @ x / scale, logits, rtol=1e-4, atol=1e-4)
    for row, mean in enumerate(profile.mean_bias(model, [(r, 2) for r in range(3)]).values()):
        torch.testing.assert_close(found[row, 2], rows @ mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.randn(64), "must hold floating point"),
        (torch.randn(2, 63), "64 wide"),
        (torch.full((1, 64), math.nan), "finite"),
        (torch.empty(0, 64), "must hold floating point"),
        (torch.tensor([True]), "token ids"),
        ([], "must hold|token ids"),
        ([101], "token ids must be from 0 to 100, not 101"),
        ([-1], "token ids must be from 0 to 100, not -1"),
        ([[1, 2]], "token ids"),
        (None, "must be a tensor"),
        ({"a": 1}, "must be a tensor"),
    ],
)
def test_other_directions_are_refused(model, good, directions, message):
    with pytest.raises(OptionError, match=message) as error:
        good.project(directions, model=model)
    assert "\n" not in str(error.value)


def test_files_without_directions_are_refused(model, good, tmp_path):
    path = tmp_path / "d"
    one = torch.randn(2, 64)
    for content, message in (
        (safetensors.torch.save({"a": one, "b": one.clone()}), "must hold one tensor"),
        (safetensors.torch.save({}), "must hold one tensor"),
        (safetensors.torch.save({"a": one[0]}), "must hold floating point"),
        (safetensors.torch.save({"a": torch.ones(2, 64, dtype=torch.int64)}), "must hold floating point"),
        (safetensors.torch.save({"a": one / 0}), "finite"),
        (safetensors.torch.save({"a": one})[:-1], "no safetensors file"),
        (b"", "no safetensors file"),
        (b"\xff" * 100, "no safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            good.project(path, model=model)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(OSError):
        good.project(tmp_path / "absent", model=model)


def test_an_unknown_way_to_the_logits_is_refused(calls):
    def changed(change):
        model = build()
        change(model)
        return model, profile_of(model, calls)

    def between(model):
        model.extra = torch.nn.Linear(64, 64)

    def inside(model):
        model.model.project_out = torch.nn.Linear(64, 64)

    def without(model):
        model.model.final = model.model._modules.pop("norm")

    def other(model):
        model.model.norm = torch.nn.Linear(64, 64)

    for change, message in (
        (between, "its extra"),
        (inside, "its project_out"),
        (without, "final norm of LlamaModel"),
        (other, "neither an RMS norm nor a LayerNorm"),
    ):
        model, profile = changed(change)
        with pytest.raises(OptionError, match=f"{message}.*pass the directions as a tensor"):
            profile.project([1], model=model)
        assert not profile.project(torch.ones(1, 64), model=model).isnan().any()


# ---------------------------------------------------------------- what the layer adds


def test_a_multiplier_multiplies():
    model = build("granite", residual_multiplier=-0.25)
    profile = profile_of(model, drawn(model))
    biases = profile.mean_bias(
        model, [(layer, 1) for layer in range(3)]
    )  # of the projection's output: without it
    found = profile.project(torch.eye(64), model=model)
    for row in range(3):
        torch.testing.assert_close(found[row, 1], -0.25 * biases[row], rtol=1e-12, atol=1e-14)
    model.model.layers[1].residual_multiplier = 0.5
    with pytest.raises(ResultsError, match="layer 1 adds .*'as it is, times -0.25'.*times 0.5"):
        profile.project(torch.eye(64), model=model)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_on_the_branch_gives_nan_with_the_reason(family):
    model = build(family)
    profile = profile_of(model, drawn(model))
    for compute in (
        lambda: profile.project([3], model=model),
        lambda: profile.mean_ablation_error_ratio(model),
    ):
        with pytest.warns(RuntimeWarning, match=r"layers 0, 1, 2.*RMSNorm on the branch") as warned:
            assert compute().isnan().all()
        assert warned[0].filename == __file__
    assert not profile.mean_ablation_error(model).isnan().any()
    assert not profile.constant_share(model).isnan().any()
    assert profile.mean_bias(model, [(0, 0)])[0].isfinite().all()


def test_an_unknown_update_gives_nan_with_the_reason(calls):
    model = build()
    model.model.layers[1].register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
    profile = profile_of(model, calls)
    with pytest.warns(RuntimeWarning, match="layers 1, .*with its gate"):
        found = profile.project([3], model=model)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


# ---------------------------------------------------------------- the right model


def every_method(profile, model):
    return (
        lambda: profile.constant_share(model),
        lambda: profile.mean_ablation_error(model),
        lambda: profile.mean_ablation_error_ratio(model),
        lambda: profile.mean_bias(model, [(0, 0)]),
        lambda: profile.project(torch.ones(1, 64), model=model),
    )


def refused(profile, model, message, kind=ResultsError):
    for method in every_method(profile, model):
        with pytest.raises(kind, match=message) as error:
            method()
        assert "\n" not in str(error.value)


def test_other_weights_are_refused(model, good):
    other = build()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    refused(good, other, "not of these weights.*the numbers are not")
    refused(good, build(dtype=torch.bfloat16), "not of these weights.*float32.*bfloat16")


def test_another_model_is_refused(good):
    refused(good, build(num_hidden_layers=2), "another model than LlamaForCausalLM")
    refused(good, torch.nn.Linear(3, 3), "another model than Linear")


def test_a_profile_without_a_fingerprint_is_refused(model, calls):
    refused(profile_of(model, calls, weights=None), model, "has no fingerprint")
    refused(profile_of(model, calls, weights={}), model, "do not prove|not of these weights")
    print_ = fingerprint(model)
    refused(profile_of(model, calls, weights=print_ | {"unseen": 1}), model, "do not prove")
    refused(profile_of(model, calls, weights=print_ | {"scheme": 1}), model, "do not prove")


def test_a_profile_without_vectors_is_refused(model, good):
    refused(HeadProfile(good.moments, good.metadata), model, "no mean vectors")


def test_a_model_split_over_ranks_is_refused_by_name(model, good, monkeypatch):
    monkeypatch.setattr(vectors_of_models, "shard_of", lambda site: object() if site.layer == 1 else None)
    refused(good, model, r"layers\.1\.self_attn\.o_proj is split.*tensor parallelism", UnsupportedWeightError)


def test_wrappers_do_not_matter(model, good):
    wrapped = torch.compile(model)
    assert torch.equal(good.constant_share(wrapped), good.constant_share(model))


# ---------------------------------------------------------------- files


def same(one, two):
    return all(getattr(one, name).tobytes() == getattr(two, name).tobytes() for name in NAMES)


def test_save_and_load_bit_for_bit(model, calls, tmp_path):
    profile = profile_of(model, calls, rows=[0, 2])
    assert np.isnan(profile.vectors.mean[1]).all() and np.isnan(profile.vectors.power[1]).all()
    profile.save(tmp_path / "p")
    loaded = HeadProfile.load(tmp_path / "p")
    assert same(loaded.vectors, profile.vectors) and loaded.metadata == profile.metadata
    assert loaded.to_bytes() == profile.to_bytes()
    assert torch.equal(
        loaded.constant_share(model).nan_to_num(-1), profile.constant_share(model).nan_to_num(-1)
    )
    assert read(profile.to_bytes(), FILE_KEY)[1]["format"] == 3


def test_files_without_vectors_are_as_before(good, tmp_path):
    plain = HeadProfile(good.moments, good.metadata)
    plain.save(tmp_path / "p")
    assert HeadProfile.load(tmp_path / "p").vectors is None
    arrays, document = read(plain.to_bytes(), FILE_KEY)
    assert document["format"] == 2 and not any(name.startswith("vectors") for name in arrays)


def edits():
    def setting(name, index, value):
        def change(arrays):
            arrays[f"vectors.{name}"][index] = value

        return change

    def reshaped(name, shape):
        def change(arrays):
            arrays[f"vectors.{name}"] = arrays[f"vectors.{name}"].reshape(shape)

        return change

    def grown(arrays):
        arrays["vectors.mean"] = np.concatenate([arrays["vectors.mean"]] * 2, axis=-1)

    def floats(arrays):
        arrays["vectors.count"] = arrays["vectors.count"].astype(np.float64)

    for name in ("power", "output_power"):
        for value in (math.nan, math.inf, -1.0, -math.inf):
            yield f"{name} {value}", setting(name, (0, 1), value)
    for value in (math.nan, math.inf, 1e200, 1e9):
        yield f"mean {value}", setting("mean", (0, 1, 3), value)
    for name in ("count", "nonfinite"):
        for value in (-1, 2**60, 2**63 - 1, 1):
            yield f"{name} {value}", setting(name, (0, 1), value)
    yield "count 0", setting("count", (0, 1), 0)
    yield "output_power too small", setting("output_power", (0, 1), 1e-6)
    yield "flat", reshaped("power", -1)
    yield "turned", reshaped("count", (4, 3))
    yield "grown", grown
    yield "floats", floats
    for name in NAMES:
        yield f"without {name}", lambda arrays, name=name: arrays.pop(f"vectors.{name}")


EDITS = dict(edits())


@pytest.mark.parametrize("name", EDITS)
def test_vectors_that_no_tokens_have_are_refused(good, name, tmp_path):
    path = tmp_path / "p"
    path.write_bytes(resealed(good.to_bytes(), FILE_KEY, change=EDITS[name]))
    with pytest.raises(ProfileFileError) as error:
        HeadProfile.load(path)
    assert "\n" not in str(error.value)


def test_vectors_under_another_format_are_refused(good, tmp_path):
    path = tmp_path / "p"
    for content, version in ((good.to_bytes(), 2), (HeadProfile(good.moments, good.metadata).to_bytes(), 3)):
        path.write_bytes(resealed(content, FILE_KEY, lambda document: document.update(format=version)))
        with pytest.raises(ProfileFileError, match="arrays are missing or unknown"):
            HeadProfile.load(path)


def test_vectors_beyond_the_heads_are_refused(calls, tmp_path):
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    profile = profile_of(model, drawn(model))
    for name in NAMES:
        arrays = dataclasses.replace(profile.vectors, **{name: getattr(profile.vectors, name).copy()})
        getattr(arrays, name)[1, 3] = 1
        with pytest.raises(ProfileError, match="mean vectors"):
            HeadProfile(profile.moments, profile.metadata, arrays).to_bytes()


def alone(profile):
    """With moments of one metric that does not say for how many tokens there are vectors."""
    return HeadProfile({RATIO_METRIC: profile.moments[RATIO_METRIC]}, profile.metadata, profile.vectors)


@pytest.mark.parametrize("name", ["count", "nonfinite"])
def test_tokens_of_heads_that_are_not_there_are_refused(name):
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    profile = alone(profile_of(model, drawn(model)))
    profile.to_bytes()
    vectors = profile.vectors
    for own in NAMES if name == "count" else (name,):  # a whole head, as if it were there
        getattr(vectors, own)[1, 3] = getattr(vectors, own)[1, 0]
    if name == "nonfinite":
        vectors.nonfinite[1, 3] = 2
    with pytest.raises(ProfileError, match="not those of any tokens"):
        profile.to_bytes()


def test_the_vector_of_one_token_has_the_tokens_own_norm(model):
    profile = alone(profile_of(model, drawn(model)))
    profile.vectors.count[:] = 1
    with pytest.raises(ProfileError, match="not those of any tokens"):
        profile.to_bytes()
    profile.vectors.output_power[:] = np.square(profile.vectors.mean).sum(-1)
    profile.to_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_number_is_refused_or_gives_nothing_impossible(data):
    model = build()
    content = profile_of(model, drawn(model)).to_bytes()
    name = data.draw(st.sampled_from(NAMES))
    number = st.integers(-(2**63), 2**63 - 1) if name in ("count", "nonfinite") else st.floats(width=64)

    def change(arrays):
        array = arrays[f"vectors.{name}"]
        array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(number)

    try:
        found = HeadProfile._of_content(resealed(content, FILE_KEY, change=change))
    except ProfileError:
        return
    with np.errstate(all="raise"):
        share, error = found.constant_share(model), found.mean_ablation_error(model)
        HeadProfile.merge([found, found], allow_repeated=True)
    assert not (error < 0).any() and not (share < 0).any() and not (share > 1).any()


@pytest.mark.parametrize("head_dim", [8, 4])
def test_a_narrower_row_has_nothing_beyond_its_width(head_dim):
    sites = [
        {"name": f"l.{i}", "layer": i, "num_heads": 2, "head_dim": width}
        for i, width in enumerate((8, head_dim))
    ]
    state = RunningMeanVectors(2, 2, 8, torch.device("cpu"))
    z = torch.randn(2, 5, 2, 8)
    state.update([0, 1], z, z.square().sum(-1))
    moments = {METRICS[0]: Moments.of(z.norm(dim=-1).transpose(0, 1).double())}
    profile = HeadProfile(moments, {"sites": sites, "token_agg": "token"}, MeanVectors.of(state.views()))
    if head_dim == 8:
        profile.to_bytes()
    else:
        with pytest.raises(ProfileError, match="not those of any tokens"):
            profile.to_bytes()


def test_other_shapes_and_dtypes_are_refused_at_once(good):
    v = good.vectors
    for changed in (
        {"mean": v.mean[..., :-1]},
        {"mean": v.mean.astype(np.float32)},
        {"count": v.count.astype(np.int32)},
        {"power": v.power[:-1]},
        {"power": torch.from_numpy(v.power)},
    ):
        with pytest.raises(ProfileError, match=f"vectors.{next(iter(changed))} must be"):
            HeadProfile(good.moments, good.metadata, dataclasses.replace(v, **changed))


@pytest.mark.parametrize("token_agg", ["token", "last", "all"])
def test_numbers_of_tokens_fit_the_numbers_of_samples(good, token_agg):
    more = dataclasses.replace(good.vectors, nonfinite=good.vectors.nonfinite + 1)
    fewer = dataclasses.replace(good.vectors, count=good.vectors.count - 1)
    for vectors, fits in ((good.vectors, True), (more, token_agg == "all"), (fewer, False)):
        profile = HeadProfile(good.moments, good.metadata | {"token_agg": token_agg}, vectors)
        if fits:
            profile.to_bytes()
        else:
            with pytest.raises(ProfileError, match="contradict each other"):
                profile.to_bytes()


# ---------------------------------------------------------------- merging


def close(one, two):
    for name in NAMES:
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-13, atol=1e-15)


def test_merging_is_all_tokens_at_once(model):
    batches = [drawn(model, seed, tokens=(3 + seed,)) for seed in range(4)]
    parts = [profile_of(model, batch) for batch in batches]
    whole = profile_of(model, [call for batch in batches for call in batch])
    merged = HeadProfile.merge(parts)
    close(merged.vectors, whole.vectors)
    a, b, c, d = parts
    tree = HeadProfile.merge([HeadProfile.merge([a, b]), HeadProfile.merge([c, d])])
    close(tree.vectors, merged.vectors)
    again = HeadProfile._of_content(merged.to_bytes())
    assert same(again.vectors, merged.vectors)
    assert same(HeadProfile.merge([a]).vectors, a.vectors)
    torch.testing.assert_close(
        merged.mean_ablation_error(model), whole.mean_ablation_error(model), rtol=1e-12, atol=0
    )


def test_merging_different_layers_is_exact(model, calls, good):
    parts = [profile_of(model, calls, rows=rows) for rows in ([0], [1, 2])]
    assert same(HeadProfile.merge(parts).vectors, good.vectors)
    assert same(HeadProfile.merge(parts[::-1]).vectors, good.vectors)


def test_merged_as_the_running_state_merges(model):
    """The same numbers, bit for bit, as of the formula in torch."""
    states = []
    for seed in range(2):
        state = RunningMeanVectors(2, 3, 4, torch.device("cpu"))
        z = torch.randn(1, 10, 3, 4, generator=torch.Generator().manual_seed(seed))
        state.update([seed], z, z.square().sum(-1))
        state.update([0], z, z.square().sum(-1))
        states.append(state)
    arrays = [MeanVectors.of(state.views()) for state in states]
    states[0].buffer.copy_(merged_buffers(states[0].buffer, states[1].buffer))
    assert same(arrays[0].merged(arrays[1]), MeanVectors.of(states[0].views()))


def test_one_part_without_vectors_leaves_none_and_says_so(model):
    one, two = (profile_of(model, drawn(model, seed)) for seed in (1, 2))
    without = HeadProfile(two.moments, two.metadata)
    with pytest.warns(RuntimeWarning, match="no mean vectors, since these have none: b") as warned:
        merged = HeadProfile.merge([one, without], names=["a", "b"])
    assert warned[0].filename == __file__
    assert merged.vectors is None
    merged.to_bytes()
    plain = HeadProfile(one.moments, one.metadata)
    assert HeadProfile.merge([plain, without]).vectors is None  # without a warning


def test_more_tokens_than_can_be_counted(model):
    one, two = (profile_of(model, drawn(model, seed), token_agg="all") for seed in (1, 2))
    for profile in (one, two):
        profile.vectors.count[0, 0] = 2**52 + 1
    with pytest.raises(MergeError, match="more tokens than can be counted"):
        HeadProfile.merge([one, two])
