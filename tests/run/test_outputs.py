"""The output and the checkpoint of a run: what cannot be written is refused before it, and two runs do not share them."""

import os
import threading
from pathlib import Path

import pytest
from tiny_models import build, tokens

import fastheads
from fastheads.errors import FileInUseError, OptionError
from fastheads.results.head_profile import HeadProfile


@pytest.fixture(scope="module")
def model():
    return build(num_hidden_layers=1)


@pytest.fixture
def never():
    """Data that no run may come to."""

    def data():
        raise AssertionError("the run began")
        yield

    return data()


@pytest.mark.parametrize("option", ["output", "checkpoint"])
def test_a_pipe_is_refused_before_the_run(option, model, never, tmp_path):
    os.mkfifo(tmp_path / "p")
    with pytest.raises(OSError, match="pipe") as caught:
        fastheads.profile(model, never, **{option: tmp_path / "p"})
    assert caught.value.filename == str(tmp_path / "p")


def test_an_output_that_cannot_be_written_is_refused_before_the_run(model, never, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path, tmp_path / ("x" * 256)):
        with pytest.raises(OSError):
            fastheads.profile(model, never, output=path)
    for option in ("output", "checkpoint"):
        with pytest.raises(OptionError, match=f"{option} must be the name of a file, not 3"):
            fastheads.profile(model, never, **{option: 3})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("shared", ["output", "checkpoint"])
def test_of_two_runs_on_one_file_the_second_is_refused(shared, model, never, tmp_path):
    files = {"output": tmp_path / "a", "checkpoint": tmp_path / "c"}
    others = {"output": tmp_path / "a2", "checkpoint": tmp_path / "c2"} | {shared: files[shared]}
    refused = []

    def other():
        try:
            fastheads.profile(model, never, **others)
        except FileInUseError as error:
            refused.append(str(error))

    def batches():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        yield tokens(1, 4)

    fastheads.profile(model, batches(), **files)
    assert len(refused) == 1 and str(files[shared]) in refused[0]
    assert HeadProfile.load(files["output"]).metadata["data"]["tokens"] == 4
    assert os.listdir(tmp_path) == ["a"]
    fastheads.profile(model, tokens(1, 5), **others)  # the lock is free again


def test_what_a_kill_in_the_final_save_left_is_swept_up_by_the_next_run(model, tmp_path):
    path = tmp_path / "a.safetensors"
    Path(tmp_path, ".a.safetensors.k1ll3d.tmp").write_bytes(b"part")
    Path(tmp_path, ".a.safetensors.lock").touch()
    fastheads.profile(model, tokens(1, 4), output=path)
    assert os.listdir(tmp_path) == [path.name]
