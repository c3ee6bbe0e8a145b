"""Whether two models are the same: a hash of the configuration and of samples of the weights, quick for any size."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each weight


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and `SAMPLES` evenly spaced elements of all parameters, and of the configuration's
    JSON. Weights that are not in memory (offloaded ones) and exotic tensors count by name, shape and dtype alone.
    """
    digest = hashlib.sha256(json.dumps(_configuration(model), sort_keys=True, default=str).encode())
    samples: dict[torch.device, list[Tensor]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
        local = getattr(weight, "_local_tensor", weight)  # of a DTensor
        if type(local) in (Tensor, nn.Parameter) and local.device.type != "meta" and local.numel():
            flat = local.detach().reshape(-1) if local.is_contiguous() else local.detach().flatten()
            step = max(flat.numel() // SAMPLES, 1)
            samples.setdefault(local.device, []).append(flat[::step][:SAMPLES].contiguous().view(torch.uint8))
    for device in sorted(samples, key=str):  # one copy from each device
        digest.update(torch.cat(samples[device]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _configuration(model: nn.Module) -> Any:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    config = dict(to_dict()) if callable(to_dict) else {}
    # What depends on how and by what it was loaded, and not on what it is.
    for key in ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"):
        config.pop(key, None)
    return config
