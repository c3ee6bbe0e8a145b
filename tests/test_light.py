"""What needs no torch: the command line's front door, and profiles that come from files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastheads.errors import ProfileError
from fastheads.results.head_profile import HeadProfile
from fastheads.stats.arrays import MomentArrays
from fastheads.stats.metrics import METRICS
from fastheads.stats.moments import Moments
from fastheads.stats.names import RATIO_METRIC

# As the first thing that the interpreter does: whoever imports torch, or what is built on it, fails.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "einops", "triton"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
"""
COMMAND_LINE = "from fastheads.cli.commands import main\nmain()\n"


def python(program: str, *arguments: str | Path, cwd: Path, blocked: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-c", (BLOCKED if blocked else "import torch\n") + program, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def profile_of(seed: int) -> HeadProfile:
    samples = np.random.default_rng(seed).lognormal(size=(9, 3, 4))
    moments = {}
    for number, metric in enumerate((*METRICS, RATIO_METRIC), 1):
        found = Moments.of(torch.tensor(number * samples))
        for plane, empty in zip(found, (0, 0, 0.0, 0.0, np.inf, -np.inf), strict=True):
            plane[1, 3] = empty  # the middle layer has three heads
        moments[metric] = found
    heads = (4, 3, 4)
    sites = [
        {"name": f"layers.{i}.o_proj", "layer": i, "num_heads": n, "head_dim": 8} for i, n in enumerate(heads)
    ]
    data = {"source": f"{seed}.txt", "tokens": 90, "sequences": 9, "complete": True}
    return HeadProfile(
        moments, {"model": "m", "sites": sites, "token_agg": "all", "skip_first": 0, "data": data}
    )


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        profile_of(seed).save(path)
    return paths


def test_the_package_and_its_front_door_do_not_import_torch(tmp_path):
    python(
        "import fastheads, fastheads.errors, fastheads.cli.commands\nfastheads.HeadProfile\n", cwd=tmp_path
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--help"], ["profile", "--help"]])
def test_help_needs_no_torch(tmp_path, arguments):
    assert python(COMMAND_LINE, *arguments, cwd=tmp_path) == python(
        COMMAND_LINE, *arguments, cwd=tmp_path, blocked=False
    )


@pytest.mark.parametrize("more", [[], ["--heads", "all"], ["--metric", METRICS[0]]])
def test_show_says_the_same_without_torch(files, tmp_path, more):
    told = python(COMMAND_LINE, "show", files[0], *more, cwd=tmp_path)
    assert told == python(COMMAND_LINE, "show", files[0], *more, cwd=tmp_path, blocked=False)
    assert "9 sequences a head" in told


def test_merge_writes_the_same_file_without_torch(files, tmp_path):
    output = tmp_path / "merged.safetensors"
    told, written = [], []
    for blocked in (True, False):
        told.append(python(COMMAND_LINE, "merge", *files, "-o", output, cwd=tmp_path, blocked=blocked))
        written.append(output.read_bytes())
    assert told[0] == told[1] and written[0] == written[1]
    HeadProfile.merge([profile_of(0), profile_of(1)]).save(output)
    assert written[0] == output.read_bytes()


def test_a_loaded_profile_is_ranked_merged_and_saved_without_torch(files, tmp_path):
    program = f"""
from fastheads import HeadProfile
one, two = [HeadProfile.load(path) for path in sys.argv[1:]]
one.save("again.safetensors")
print(repr(one), one.shape, one.layers, one.metrics)
print(one.rank(), one.rank("{METRICS[2]}", descending=True), one.lowest(0.3), one.ranked_cells())
merged = HeadProfile.merge([one, two])
merged.save("merged.safetensors")
print(merged.rank(), merged.metadata["data"]["tokens"])
"""
    told = python(program, *files, cwd=tmp_path)
    assert (tmp_path / "again.safetensors").read_bytes() == files[0].read_bytes()
    one, two = profile_of(0), profile_of(1)
    merged = HeadProfile.merge([one, two])
    assert told.splitlines() == [
        f"{one!r} {one.shape} {one.layers} {one.metrics}",
        f"{one.rank()} {one.rank(METRICS[2], descending=True)} {one.lowest(0.3)} {one.ranked_cells()}",
        f"{merged.rank()} 180",
    ]
    assert (tmp_path / "merged.safetensors").read_bytes() == merged.to_bytes()


@pytest.mark.parametrize("command", [["--help"], ["show", "0.safetensors"], ["merge", "-o", "m.safetensors"]])
def test_the_front_door_opens_in_half_a_second(files, tmp_path, command):
    if command[0] == "merge":
        command = [*command, *map(str, files)]
    program = f"""
import resource, subprocess
subprocess.run([sys.executable, "-m", "fastheads", *{command!r}], check=True, capture_output=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""
    # The processor's seconds, which other programs on the machine do not lengthen much; the first may compile modules.
    assert min(float(python(program, cwd=tmp_path)) for _ in range(3)) < 0.5


def test_errors_of_files_need_no_torch(files, tmp_path):
    program = """
import fastheads
from fastheads.errors import MergeError, OptionError, ProfileFileError
one = fastheads.HeadProfile.load(sys.argv[1])
for wrong, error in [
    (lambda: fastheads.HeadProfile.merge([one, one]), MergeError),
    (lambda: fastheads.HeadProfile.load(sys.argv[0]), OSError),
    (lambda: one.rank("?"), OptionError),
    (lambda: fastheads.HeadProfile.load("damaged"), ProfileFileError),
]:
    try:
        wrong()
    except error as told:
        print(told)
    else:
        raise AssertionError(wrong)
"""
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    assert len(python(program, files[0], cwd=tmp_path).splitlines()) == 4


def test_the_tables_need_no_torch(files, tmp_path):
    pytest.importorskip("pandas")
    program = "from fastheads import HeadProfile\nprint(HeadProfile.load(sys.argv[1]).to_pandas().to_csv())\n"
    told = python(program, files[0], cwd=tmp_path)
    assert told.strip() == profile_of(0).to_pandas().to_csv().strip()


def test_the_picture_needs_no_torch(files, tmp_path):
    pytest.importorskip("matplotlib")
    program = (
        "from fastheads import HeadProfile\nHeadProfile.load(sys.argv[1]).plot().figure.savefig('p.png')\n"
    )
    python(program, files[0], cwd=tmp_path)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_moments_of_a_loaded_profile_are_tensors_that_can_be_written(files):
    loaded = HeadProfile.load(files[0])
    assert isinstance(loaded.moments[RATIO_METRIC], Moments)
    for metric, moments in profile_of(0).moments.items():
        for found, wanted in zip(loaded.moments[metric], moments, strict=True):
            assert isinstance(found, torch.Tensor) and found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    before = loaded.rank()
    loaded.moments[RATIO_METRIC].mean[2, 1] = 1e6
    assert before[-1] != (2, 1) and loaded.rank()[-1] == (2, 1)
    del loaded.moments[METRICS[0]]
    assert METRICS[0] not in loaded.metrics
    loaded.moments = profile_of(1).moments
    assert loaded.rank() == profile_of(1).rank()


def test_a_profile_keeps_the_tensors_that_it_is_given():
    moments = profile_of(0).moments
    profile = HeadProfile(moments, profile_of(0).metadata)
    profile.rank()
    assert profile.moments is moments
    statistics = profile.results()[RATIO_METRIC]
    assert all(isinstance(values, torch.Tensor) for values in statistics.values())


def test_a_profile_can_be_made_of_arrays():
    one = profile_of(0)
    arrays = {metric: MomentArrays(*(plane.numpy() for plane in m)) for metric, m in one.moments.items()}
    assert HeadProfile(arrays, one.metadata).to_bytes() == one.to_bytes()
    wrong = {RATIO_METRIC: arrays[RATIO_METRIC]._replace(mean=np.zeros((3, 4), np.float32))}
    with pytest.raises(
        ProfileError, match=r"/mean must be torch.float64 \[3, 4\] on the CPU, not torch.float32"
    ):
        HeadProfile(wrong, one.metadata)


def test_arrays_that_cannot_be_written_become_tensors_that_can():
    one = profile_of(0)
    arrays = {
        m: MomentArrays(*(plane.numpy().copy() for plane in planes)) for m, planes in one.moments.items()
    }
    for planes in arrays.values():
        for plane in planes:
            plane.flags.writeable = False
    made = HeadProfile(arrays, one.metadata)
    made.moments[RATIO_METRIC].mean[0, 0] = 7.0
    assert arrays[RATIO_METRIC].mean[0, 0] != 7.0


@pytest.mark.parametrize("scale", [1.0, 1e-320, 1e-160, 1e160, 1.7e308])
def test_moments_of_arrays_and_of_tensors_are_the_same_to_the_last_bit(scale):
    generator = np.random.default_rng(3)
    with np.errstate(all="ignore"):
        samples = [generator.lognormal(size=(n, 5, 4)) * scale for n in (1, 8, 3)]
    samples[1][:, 0] = np.nan  # row 0 has none there
    samples[2][:, 1:3] = np.inf
    parts = [Moments.of(torch.from_numpy(s)) for s in samples]
    empty = Moments.of(torch.full((1, 5, 4), torch.nan).double())
    total = parts[0]
    arrays = MomentArrays(*(plane.numpy() for plane in total))
    for other in (*parts[1:], empty, total):
        total = total.merged(other)
        arrays = arrays.merged(MomentArrays(*(plane.numpy() for plane in other)))
        for plane, array in zip(total, arrays, strict=True):
            np.testing.assert_array_equal(plane.numpy(), array, strict=True)
        np.testing.assert_array_equal(total.var().numpy(), arrays.var(), strict=True)


def test_every_public_name_is_found_and_only_when_it_is_asked_for(tmp_path):
    import fastheads

    assert set(fastheads.__all__) == {*fastheads._HOMES, "__version__"}
    for name in fastheads.__all__:
        assert getattr(fastheads, name) is not None
    program = "import fastheads\nfastheads.OptionError, fastheads.ResultsError, fastheads.HeadProfile\nprint(len(dir(fastheads)))"
    assert int(python(program, cwd=tmp_path)) >= len(fastheads.__all__)


def test_a_report_and_tables_need_no_torch(files, tmp_path):
    program = """
from fastheads import HeadProfile
one = HeadProfile.load(sys.argv[1])
one.report("r.html")
one.to_csv("t.csv")
assert "iframe" in one._repr_html_()
print(one["head_output_norm"]["mean"][0, 0])
"""
    told = python(program, files[0], cwd=tmp_path)
    assert float(told) == profile_of(0).statistics("head_output_norm")["mean"][0, 0]
    assert (tmp_path / "r.html").stat().st_size > 10_000
    python(COMMAND_LINE, "report", *files, "-o", "both.html", cwd=tmp_path)
    python(COMMAND_LINE, "show", files[0], "--json", cwd=tmp_path)
