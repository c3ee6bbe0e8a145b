"""Query properties of a model that a run needs, and put it in evaluation mode."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastheads.models.sites import HeadSite


def config_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the configuration without the entries that depend on how the model was loaded."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config: dict[str, Any] = dict(to_dict()) if callable(to_dict) else {}
    for key in ("_name_or_path", "transformers_version", "use_cache"):
        config.pop(key, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def is_causal(model: nn.Module, sites: list[HeadSite]) -> bool:
    """True if no token attends to later ones in any layer, so that padding on the right needs no mask."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        return False
    owners = [model.get_submodule(site.name.rpartition(".")[0]) for site in sites]
    return all(getattr(owner, "is_causal", None) is True for owner in owners)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds `input_ids`; None if unknown."""
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_input_embeddings() if callable(get_input_embeddings) else None
    return embedding if isinstance(embedding, nn.Module) else None


def input_device(model: nn.Module) -> torch.device:
    """Return the device that `input_ids` belong on."""
    parameter = next((input_embedding(model) or model).parameters(), None)
    if parameter is None or parameter.device.type == "meta":  # offloaded: its own hooks move the inputs
        return torch.device("cpu")
    return parameter.device


def takes_argument(module: nn.Module, argument: str) -> bool:
    """True if `module.forward` accepts the keyword argument."""
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
