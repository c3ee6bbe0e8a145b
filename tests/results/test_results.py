"""HeadProfile against values computed by hand or by numpy in float64, and against files that lie."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastheads.errors import MergeError, OptionError, ProfileFileError
from fastheads.results.head_profile import FILE_KEY, RANKING_METRIC, STATS, HeadProfile
from fastheads.stats.metrics import UPDATE_METRIC
from fastheads.stats.moments import Moments

METRIC = RANKING_METRIC
OTHER = "head_output_norm"


def site(layer: int, num_heads: int = 3) -> dict:
    return {
        "name": f"model.layers.{layer}.self_attn.o_proj",
        "layer": layer,
        "num_heads": num_heads,
        "head_dim": 8,
    }


def metadata(**changes) -> dict:
    base = {"model": "tiny", "sites": [site(0), site(5, 2)], "token_agg": "all", "skip_first": 0}
    base |= {"backend": "factored", "precision": "exact", "layers": None, "versions": {"torch": "2"}}
    return base | changes


def moments_of(samples: np.ndarray) -> Moments:
    """Moments of `samples` [n, rows, heads]; row 1 has two heads only, so its last column is empty."""
    m = Moments.of(torch.tensor(samples))
    for plane, empty in zip(m, (0, 0, 0.0, 0.0, math.inf, -math.inf), strict=True):
        plane[1, 2] = empty
    return m


def make(samples: np.ndarray, **changes) -> HeadProfile:
    return HeadProfile({METRIC: moments_of(samples), OTHER: moments_of(10 * samples)}, metadata(**changes))


@pytest.fixture
def samples() -> np.ndarray:
    return np.random.default_rng(0).lognormal(size=(7, 2, 3))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-1.25), b.nan_to_num(nan=-1.25))


def test_statistics_equal_those_of_numpy(samples):
    stats = make(samples).results()[METRIC]
    expected = {
        "mean": samples.mean(0),
        "var": samples.var(0, ddof=1),
        "std": samples.std(0, ddof=1),
        "sem": samples.std(0, ddof=1) / np.sqrt(7),
        "min": samples.min(0),
        "max": samples.max(0),
    }
    assert tuple(stats) == STATS
    exists = np.array([[True, True, True], [True, True, False]])
    for name, value in expected.items():
        got = stats[name].numpy()
        assert got.dtype == np.float64
        np.testing.assert_allclose(got[exists], value[exists], rtol=1e-13)
        assert math.isnan(got[1, 2]), name
    assert stats["count"].tolist() == [[7, 7, 7], [7, 7, 0]]
    assert stats["nonfinite"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert stats["count"].dtype == stats["nonfinite"].dtype == torch.int64


def test_one_sample_has_a_mean_and_no_spread():
    stats = make(np.full((1, 2, 3), 2.5)).results()[METRIC]
    for name in ("mean", "min", "max"):
        assert stats[name][0].tolist() == [2.5] * 3
    for name in ("var", "std", "sem"):
        assert stats[name].isnan().all(), name


def test_results_are_copies(samples):
    profile = make(samples)
    results = profile.results()
    results[METRIC]["count"].zero_()
    results["metadata"]["sites"].clear()
    assert profile.results()[METRIC]["count"][0, 0] == 7
    assert len(profile.results()["metadata"]["sites"]) == 2


def ranked_profile() -> HeadProfile:
    return make(np.array([[[3.0, 1.0, 2.0], [1.0, 0.5, 9.0]]]))  # the 9.0 is the head that does not exist


def test_rank_is_lowest_first_in_absolute_layers_with_ties_by_position():
    assert ranked_profile().rank() == [(5, 1), (0, 1), (5, 0), (0, 2), (0, 0)]
    assert ranked_profile().ranked_cells(OTHER) == [(1, 1), (0, 1), (1, 0), (0, 2), (0, 0)]
    assert ranked_profile().rank(descending=True) == [(0, 0), (0, 2), (0, 1), (5, 0), (5, 1)]


@pytest.mark.parametrize(("fraction", "heads"), [(0, 0), (0.1, 0), (0.4, 2), (0.5, 2), (0.6, 3), (1, 5)])
def test_lowest_fraction(fraction, heads):
    profile = ranked_profile()
    assert profile.lowest(fraction) == profile.rank()[:heads]


def test_lowest_is_not_fooled_by_binary_fractions():
    wide = {METRIC: Moments.of(torch.arange(100.0).view(1, 1, 100))}
    profile = HeadProfile(wide, metadata(sites=[site(0, 100)]))
    assert len(profile.lowest(0.29)) == 29  # 0.29 * 100 is 28.999...


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        ranked_profile().lowest(fraction)


def test_an_unknown_metric_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=f"no metric 'norm'.*{METRIC}"):
        ranked_profile().rank("norm")


def test_to_pandas_is_tidy_and_leaves_out_heads_that_do_not_exist(samples):
    frame = make(samples).to_pandas()
    assert list(frame.columns) == ["layer", "head", "metric", *STATS]
    assert len(frame) == 2 * 5
    assert not frame.isna().any().any()
    row = frame[(frame.layer == 5) & (frame["head"] == 1) & (frame.metric == OTHER)]
    assert row["mean"].item() == pytest.approx(10 * samples[:, 1, 1].mean(), rel=1e-13)
    assert set(zip(frame.layer, frame["head"], strict=True)) == {(0, 0), (0, 1), (0, 2), (5, 0), (5, 1)}
    assert frame["count"].dtype == np.int64


def test_a_head_with_nothing_but_nonfinite_samples_is_shown():
    values = np.ones((2, 2, 3))
    values[:, 0, 1] = math.nan
    frame = make(values).to_pandas()
    cell = frame[(frame.layer == 0) & (frame["head"] == 1) & (frame.metric == METRIC)]
    assert (cell["count"].item(), cell["nonfinite"].item()) == (0, 2)
    assert math.isnan(cell["mean"].item())


def test_without_pandas_the_error_names_the_extra(samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'fastheads\[plot\]'"):
        make(samples).to_pandas()


def test_save_and_load_round_trip_bit_for_bit(samples, tmp_path):
    samples[0, 0, 1] = math.inf
    profile = make(samples, data={"source": "texts", "tokens": 5, "sequences": 1, "complete": True})
    path = tmp_path / "new folder" / "profile.safetensors"
    profile.save(path)
    loaded = HeadProfile.load(path)
    assert loaded.metadata == profile.metadata
    assert loaded.metrics == profile.metrics  # their order too
    for metric in profile.metrics:
        for a, b in zip(loaded.moments[metric], profile.moments[metric], strict=True):
            assert same(a, b)
    assert os.listdir(path.parent) == [path.name]


def test_the_file_is_plain_safetensors_with_one_string_of_json(samples, tmp_path):
    path = tmp_path / "p.safetensors"
    make(samples).save(path)
    with safetensors.safe_open(path, framework="np") as file:
        assert list(file.metadata()) == [FILE_KEY]
        assert json.loads(file.metadata()[FILE_KEY])["metadata"] == metadata()
        assert f"{METRIC}/m2" in file.keys()  # noqa: SIM118
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_save_leaves_the_old_file_and_no_other(samples, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    make(samples).save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        make(samples + 1).save(path)
    assert error.value.filename == str(path)  # as the system does not say
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.safetensors"]


def saved(tmp_path: Path, tensors=None, document=None, strings=None) -> Path:
    """A file as `save()` writes it, with arrays or metadata changed by the functions given."""
    profile = ranked_profile()
    arrays = {f"{m}/{plane}": v for m in profile.metrics for plane, v in profile.moments[m]._asdict().items()}
    content = {"format": 1, "metrics": list(profile.metrics), "metadata": metadata()}
    if tensors:
        tensors(arrays)
    if document:
        document(content)
    path = tmp_path / "hostile.safetensors"
    safetensors.torch.save_file(arrays, path, {FILE_KEY: json.dumps(content)} if strings is None else strings)
    return path


def test_the_helper_makes_a_good_file(tmp_path):
    assert HeadProfile.load(saved(tmp_path)).rank() == ranked_profile().rank()


def change(plane: str, cell: tuple[int, int], value: float):
    def apply(arrays: dict) -> None:
        arrays[f"{METRIC}/{plane}"][cell] = value

    return apply


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lambda t: t.pop(f"{METRIC}/m2"), "missing or unknown"),
        (lambda t: t.update(extra=torch.zeros(2, 3)), "of 'F32'"),
        (lambda t: t.update(extra=torch.zeros(2, 3).double()), "missing or unknown"),
        (lambda t: t.update({f"{METRIC}/mean": torch.zeros(2, 3)}), "must be torch.float64"),
        (lambda t: t.update({f"{METRIC}/count": torch.zeros(2, 3).double()}), "must be torch.int64"),
        (lambda t: t.update({f"{METRIC}/mean": torch.zeros(2, 3).long()}), "must be torch.float64"),
        (lambda t: t.update({f"{METRIC}/mean": torch.zeros(3, 2).double()}), r"\[2, 3\]"),
        (lambda t: t.update({k: torch.zeros(6, dtype=v.dtype) for k, v in t.items()}), r"\[rows, heads\]"),
        (lambda t: t.update({k: torch.zeros(1, 3, dtype=v.dtype) for k, v in t.items()}), "a site for each"),
        (lambda t: t.update({k: torch.zeros(0, 2**40, dtype=v.dtype) for k, v in t.items()}), "is empty"),
        (lambda t: t.update({k: torch.zeros(2, 0, dtype=v.dtype) for k, v in t.items()}), "is empty"),
        (change("count", (0, 0), -1), "contradict"),
        (change("nonfinite", (0, 0), -1), "contradict"),
        (change("mean", (0, 0), math.nan), "contradict"),
        (change("m2", (0, 0), -1.0), "contradict"),
        (change("min", (0, 0), 99.0), "contradict"),
        (change("count", (0, 0), 0), "contradict"),
        (change("nonfinite", (1, 2), 4), "do not have"),
    ],
)
def test_hostile_arrays_are_refused_in_one_line(tmp_path, tensors, says):
    path = saved(tmp_path, tensors=tensors)
    with pytest.raises(ProfileFileError, match=says) as error:
        HeadProfile.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def set_site(key: str, value: object):
    def apply(document: dict) -> None:
        document["metadata"]["sites"][1][key] = value

    return apply


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (lambda d: d.update(format=99), "format is 99"),
        (lambda d: d.update(metadata=[]), "not an object"),
        (lambda d: d.update(metrics=None), "name its metrics"),
        (lambda d: d.update(metrics=[METRIC, 3]), "name its metrics"),
        (lambda d: d.update(metrics=["\x1b[2J"]), "name its metrics"),
        (lambda d: d.update(metrics=[]), "missing or unknown"),
        (lambda d: d["metadata"].pop("sites"), "a site for each"),
        (lambda d: d["metadata"]["sites"].pop(), "a site for each"),
        (lambda d: d["metadata"].update(sites=[1, 2]), "has no name"),
        (set_site("name", 3), "has no name"),
        (set_site("layer", "5"), "whole numbers"),
        (set_site("layer", True), "whole numbers"),
        (set_site("layer", -1), "out of range"),
        (set_site("num_heads", 4), "out of range"),
        (set_site("num_heads", 0), "out of range"),
        (set_site("num_heads", 1), "do not have"),
        (set_site("head_dim", 10**400), "out of range"),
        (lambda d: d["metadata"].update(skip_first=math.nan), "NaN"),
        (lambda d: d["metadata"].update(model=["x"]), "model in its metadata must be str"),
        (lambda d: d["metadata"].update(data=[]), "data in its metadata must be dict"),
        (lambda d: d["metadata"].update(data={"tokens": "many"}), "tokens in its metadata must be int"),
        (lambda d: d["metadata"].update(data={"parts": [1]}), "parts of its metadata"),
        (
            lambda d: d["metadata"].update(data={"parts": [{"tokens": "x"}]}),
            "tokens in its metadata must be int",
        ),
        (lambda d: d["metadata"].update(layers="0"), "layers in its metadata must be list or null"),
        (lambda d: d["metadata"].update(layers=[[0]]), "layers in its metadata are not whole numbers"),
        (lambda d: d["metadata"].update(weights="same"), "weights in its metadata must be dict or null"),
        (
            lambda d: d["metadata"].update(residual_update={}),
            "residual_update in its metadata must be str or list",
        ),
    ],
)
def test_hostile_metadata_are_refused_in_one_line(tmp_path, document, says):
    with pytest.raises(ProfileFileError, match=says) as error:
        HeadProfile.load(saved(tmp_path, document=document))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"metadata": {}}'])
def test_metadata_that_are_no_document_are_refused(tmp_path, text):
    with pytest.raises(ProfileFileError, match="not a head profile"):
        HeadProfile.load(saved(tmp_path, strings={FILE_KEY: text}))


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\x80" + b"\0" * 7 + b"{" * 128])
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ProfileFileError, match="not a head profile"):
        HeadProfile.load(path)


def test_a_truncated_file_and_a_model_s_file_are_refused(tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ProfileFileError):
        HeadProfile.load(path)
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ProfileFileError, match="no fastheads metadata"):
        HeadProfile.load(path)


def test_missing_files_and_folders_raise_the_usual_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        HeadProfile.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        HeadProfile.load(tmp_path)


def test_merged_parts_equal_one_pass(samples):
    merged = HeadProfile.merge([make(samples[:2]), make(samples[2:3]), make(samples[3:])]).results()
    for metric, factor in ((METRIC, 1), (OTHER, 10)):
        exists = ~merged[metric]["mean"].isnan().numpy()
        assert exists.sum() == 5
        values = factor * samples
        np.testing.assert_allclose(merged[metric]["mean"].numpy()[exists], values.mean(0)[exists], rtol=1e-14)
        np.testing.assert_allclose(
            merged[metric]["var"].numpy()[exists], values.var(0, ddof=1)[exists], rtol=1e-13
        )
        assert (merged[metric]["max"].numpy()[exists] == values.max(0)[exists]).all()
        assert merged[metric]["count"].tolist() == [[7, 7, 7], [7, 7, 0]]


def test_merging_does_not_change_its_parts(samples):
    a, b = make(samples[:3]), make(samples[3:])
    HeadProfile.merge([a, b])
    assert a.results()[METRIC]["count"][0, 0] == 3
    assert HeadProfile.merge([a]).metadata == a.metadata


def weights(seed: str = "w", layout: str = "l", dtype: str = "float32", unseen: int = 0) -> dict:
    return {
        "sha256": seed + layout,
        "layout": layout,
        "dtypes": [dtype],
        "tensors": 9,
        "unseen": unseen,
        "scheme": 2,
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "other", "weights": None}, "model: 'tiny' and 'other'$"),
        (
            {"model": "other", "weights": weights("v")},
            r"model: 'tiny' and 'other' \(weights: names and shapes are",
        ),
        ({"weights": weights("v")}, "weights: names and shapes are the same, the numbers are not"),
        (
            {"weights": weights(layout="m", dtype="bfloat16")},
            "weights: one has float32, the other bfloat16",
        ),
        ({"weights": weights(layout="m")}, "weights: they have other names or shapes"),
        ({"weights": weights(layout="m", unseen=3)}, "weights: they have other names or shapes"),
        ({"token_agg": "last"}, "token_agg: 'all' and 'last'"),
        ({"skip_first": 1}, "skip_first: 0 and 1"),
        (
            {"sites": [site(0), site(6, 2)]},
            "sites: '.*5.*' with 2 heads of 8, and '.*6.*' with 2 heads of 8",
        ),
        ({"sites": [site(0), site(5, 2) | {"layer": 6}]}, "sites: '.*5.*' is layer 5 and 6"),
    ],
)
def test_profiles_of_different_things_do_not_merge(samples, changes, says):
    a, b = make(samples[:3], weights=weights()), make(samples[3:], **({"weights": weights()} | changes))
    with pytest.raises(MergeError, match=f"cannot merge profile 1 and profile 2: they differ in .*{says}"):
        HeadProfile.merge([a, b])
    with pytest.raises(MergeError, match="cannot merge c and b: "):  # wherever they stand
        HeadProfile.merge([make(samples[:1], weights=weights()), a, b][1:], names=["c", "b"])


def test_the_same_weights_merge_under_any_name_and_old_files_by_their_name(samples):
    a = make(samples[:3], weights=weights())
    for other in (
        make(samples[3:], model="/elsewhere/tiny", weights=weights()),
        make(samples[3:]),  # an older file
        make(samples[3:], weights=None),
        make(samples[3:], weights=weights("v", unseen=1)),
    ):
        merged = HeadProfile.merge([other, a])
        assert merged.metadata["weights"] == weights()
        assert merged.results()[METRIC]["count"][0, 0] == 7
    for unsure in (weights(unseen=1), weights("v", unseen=1)):
        with pytest.raises(MergeError, match="differ in model"):
            HeadProfile.merge([a, make(samples[3:], model="other", weights=unsure)])


def run_over(sha: str | None = "s", head: str | None = None, **more) -> dict:
    data = {"source": "text.txt", "sha256": sha, "tokens": 9, "sequences": 3, "complete": True}
    return data | ({} if head is None else {"head_sha256": head, "window_characters": 10}) | more


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (run_over(), run_over(source="copy.txt"), "both hold 'text.txt', which would count twice"),
        (run_over(), run_over("t"), None),
        (run_over(None), run_over(None), None),  # token batches: nobody knows
        (run_over(None, "h"), run_over(None, "h"), "both hold 'text.txt'"),
        (run_over(None, "h"), run_over(None, "i"), None),
        (
            run_over("s", "h"),
            run_over("t", "h", source="text.parquet"),
            "both 'text.txt' and 'text.parquet' begin",
        ),
        (
            run_over("s", "h", shard=[0, 2]),
            run_over("t", "h", shard=[1, 2]),
            "both 'text.txt' and 'text.txt' begin",
        ),
        (run_over("s", "h"), run_over("t", "i"), None),
        (
            run_over("s", "h", shard=[0, 2], cut="stream"),
            run_over("s", "h", shard=[1, 2], cut="documents"),
            "parts of 'text.txt' that were cut in different ways",
        ),
        (run_over("s", "h", shard=[0, 2]), run_over("s", "h", shard=[1, 2]), None),
        (run_over("s", "h", shard=[1, 2]), run_over("s", "h", shard=[1, 2]), r"a part of 'text.txt' \(2/2\)"),
        (run_over("s", "h", shard=[0, 2]), run_over("s", "h", shard=[2, 4]), r"\(1/2 and 3/4\)"),
        (run_over("s", "h", shard=[0, 2]), run_over("s", "h", shard=[1, 4]), None),
        (run_over("s", "h", shard=[0, 2]), run_over("s", "h", shard=[1, 3]), r"\(1/2 and 2/3\)"),
        (run_over("s", "h", shard=[0, 2]), run_over("s"), "both hold"),
        (
            run_over("s", "h", shard=[0, 2]),
            run_over("s", "h", shard=[1, 2], window_characters=20),
            "parts of 'text.txt' that were cut in windows of different sizes",
        ),
        (run_over("s", shard=["a", 2]), run_over("s", shard=[5, 2]), "both hold 'text.txt'"),
        (run_over(3, [4]), run_over(3, [4]), None),
    ],
)
def test_profiles_that_repeat_data_do_not_merge_unless_that_is_asked_for(samples, one, two, says):
    parts = [make(samples[:3], data=one), make(samples[3:], data=two)]
    if says is not None:
        with pytest.raises(MergeError, match=f"cannot merge profile 1 and profile 2: .*{says}"):
            HeadProfile.merge(parts)
        third = make(samples[:1], data=run_over("third"))
        with pytest.raises(MergeError, match="cannot merge a and b: "):  # inside a merged one too
            HeadProfile.merge([HeadProfile.merge([third, parts[0]]), parts[1]], names=["a", "b"])
    merged = HeadProfile.merge(parts, allow_repeated=says is not None)
    assert merged.results()[METRIC]["count"][0, 0] == 7
    assert merged.metadata["data"]["tokens"] == 18


def test_the_same_profile_twice_is_found_without_any_data_to_tell(samples):
    with pytest.raises(MergeError, match="both hold the very same samples"):
        HeadProfile.merge([make(samples), make(samples[:2]), make(samples)])
    twice = HeadProfile.merge([make(samples), make(samples)], allow_repeated=True)
    assert twice.results()[METRIC]["count"][0, 0] == 14


def test_disjoint_parts_may_have_the_very_same_moments(samples):
    parts = [make(samples, data=run_over("s", "h", shard=[i, 3])) for i in range(3)]
    merged = HeadProfile.merge([HeadProfile.merge(parts[:2]), parts[2]])
    assert merged.results()[METRIC]["count"][0, 0] == 21
    both = {"parts": [run_over("s", "h", shard=[1, 3]), run_over("t", "i")]}
    for other in (run_over("t", "i"), run_over(None), both):  # that these are other data nobody says
        with pytest.raises(MergeError, match="the very same samples"):
            HeadProfile.merge([parts[0], make(samples, data=other)])


def without_row(samples: np.ndarray, row: int, **changes) -> HeadProfile:
    profile = make(samples, **changes)
    for moments in profile.moments.values():
        for plane, empty in zip(moments, (0, 0, 0.0, 0.0, math.inf, -math.inf), strict=True):
            plane[row] = empty
    return profile


def test_other_layers_over_the_same_data_are_no_repetition(samples):
    lower = without_row(samples, 1, data=run_over(), layers=[0], residual_update=["as it is", ""])
    upper = without_row(samples, 0, data=run_over(), layers=[5], residual_update=["", "normed (N)"])
    merged = HeadProfile.merge([lower, upper])
    assert merged.results()[METRIC]["count"].tolist() == [[7, 7, 7], [7, 7, 0]]
    assert merged.metadata["layers"] == [0, 5]
    assert merged.metadata["residual_update"] == ["as it is", "normed (N)"]
    alike = without_row(samples, 0, data=run_over(), layers=[5], residual_update=["", "as it is"])
    assert HeadProfile.merge([lower, alike]).metadata["residual_update"] == "as it is"
    with pytest.raises(MergeError, match=r"cannot merge profile 1 and profile 3: both hold 'text\.txt'"):
        HeadProfile.merge([lower, upper, without_row(samples[:3], 1, data=run_over())])


def test_updates_that_were_measured_differently_do_not_merge(samples):
    def part(chosen: np.ndarray, told: object, measured: bool = True) -> HeadProfile:
        profile = make(chosen, residual_update=told)
        moments = moments_of(chosen)
        if not measured:
            moments = without_row(chosen, slice(None)).moments[METRIC]
        return HeadProfile({**profile.moments, UPDATE_METRIC: moments}, profile.metadata)

    scaled, plain = part(samples[:3], "as it is, times 0.5"), part(samples[3:], "as it is")
    with pytest.raises(
        MergeError, match="differ in what layer 0 adds.*: 'as it is, times 0.5' and 'as it is'"
    ):
        HeadProfile.merge([scaled, plain])
    unknown = part(samples[3:], "not measured: why", measured=False)
    for order in ([unknown, scaled], [scaled, unknown]):
        assert HeadProfile.merge(order).metadata["residual_update"] == "as it is, times 0.5"
    for odd in (["one"], [3, None], None):
        assert (
            HeadProfile.merge([part(samples[3:], odd), scaled]).metadata["residual_update"]
            == "as it is, times 0.5"
        )


def test_profiles_with_different_metrics_do_not_merge(samples):
    a = make(samples)
    b = HeadProfile({METRIC: a.moments[METRIC]}, metadata())
    with pytest.raises(ValueError, match="differ in metrics"):
        HeadProfile.merge([a, b])
    with pytest.raises(ValueError, match="no profiles"):
        HeadProfile.merge([])


def test_merged_metadata_sum_the_data_and_unite_the_layers(samples):
    def part(source: str, tokens: int, complete: bool) -> dict:
        return {"source": source, "tokens": tokens, "sequences": 2, "complete": complete}

    a = make(samples[:2], data=part("a.txt", 10, True), layers=[0], backend="loop")
    b = make(samples[2:4], data=part("b.txt", 5, True), layers=[5])
    c = make(samples[4:], data=part("c.txt", 1, False), layers=[5])
    merged = HeadProfile.merge([HeadProfile.merge([a, b]), c]).metadata
    assert merged["data"]["tokens"] == 16
    assert merged["data"]["sequences"] == 6
    assert merged["data"]["complete"] is False
    assert [p["source"] for p in merged["data"]["parts"]] == ["a.txt", "b.txt", "c.txt"]
    assert merged["layers"] == [0, 5]
    assert merged["backend"] == "loop+factored"
    assert a.metadata["layers"] == [0]


def test_a_profile_of_wrong_planes_is_refused():
    with pytest.raises(ValueError, match="no metrics"):
        HeadProfile({}, metadata())
    floats = Moments.of(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match=r"count must be torch\.int64"):
        HeadProfile({METRIC: floats._replace(count=floats.count.double())}, metadata())


def test_importing_results_imports_neither_pandas_nor_matplotlib():
    code = "import sys, fastheads.results.head_profile; print({'pandas', 'matplotlib', 'triton'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def sampled(**changes) -> dict:
    """A fingerprint of the scheme that read a few numbers of each tensor."""
    return {key: value for key, value in (weights() | changes).items() if key != "scheme"}


def test_fingerprints_of_two_schemes_say_nothing_of_each_other(samples):
    for old in (sampled(), sampled(sha256="other"), sampled(layout="other", dtypes=["bfloat16"])):
        parts = [make(samples[:3], weights=old), make(samples[3:], weights=weights())]
        for order in (parts, parts[::-1]):
            assert HeadProfile.merge(order).metadata["weights"] == weights()
        with pytest.raises(MergeError, match="differ in model"):
            HeadProfile.merge([parts[0], make(samples[3:], model="other", weights=weights())])


def test_a_few_numbers_that_are_alike_are_not_the_same_weights(samples):
    old = make(samples[:3], weights=sampled())
    assert HeadProfile.merge([old, make(samples[3:], weights=sampled())]).metadata["weights"] == sampled()
    with pytest.raises(MergeError, match="differ in model"):
        HeadProfile.merge([old, make(samples[3:], model="other", weights=sampled())])
    with pytest.raises(MergeError, match="the numbers are not"):
        HeadProfile.merge([old, make(samples[3:], weights=sampled(sha256="other"))])


def test_where_the_same_tensors_were_not_seen_the_others_are_compared(samples):
    one = make(samples[:3], weights=weights(unseen=1) | {"unseen_names": "n"})
    other = make(samples[3:], weights=weights("v", unseen=1) | {"unseen_names": "n"})
    elsewhere = make(samples[3:], weights=weights("v", unseen=1) | {"unseen_names": "m"})
    with pytest.raises(MergeError, match="the numbers are not"):
        HeadProfile.merge([one, other])
    assert HeadProfile.merge([one, elsewhere]).results()[METRIC]["count"][0, 0] == 7


def test_as_many_names_as_profiles(samples):
    with pytest.raises(OptionError, match="names must be one for each profile: 1, not 2"):
        HeadProfile.merge([make(samples)], names=["a", "b"])
