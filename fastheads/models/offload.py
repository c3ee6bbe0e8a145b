"""Read weights that accelerate offloads to the CPU or to disk between forwards."""

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.models.weight_formats import NotDenseError, Parts, plain_function


@dataclass(frozen=True)
class OffloadedWeight:
    """The location of one module's weight between forwards."""

    weights: Any  # accelerate's map from names to tensors
    name: str  # the key in it
    device: Any  # execution device
    dtype: torch.dtype  # in the forward

    def fetch(self) -> Tensor:
        """Return the weight `[out_features, in_features]` on its execution device."""
        return self.weights[self.name].detach().to(self.device, self.dtype)  # type: ignore[no-any-return]

    def parts(self) -> Parts:
        """Return what the weight depends on: a tensor, or a file's path, time and size."""
        held = getattr(self.weights, "state_dict", None)
        if held is None and isinstance(self.weights, dict):
            held = self.weights
        if held is not None and self.name in held:
            return (held[self.name], self.dtype)
        info = self.weights.index[self.name]
        path = info.get("safetensors_file") or os.path.join(self.weights.save_folder, f"{self.name}.dat")
        try:
            stat = os.stat(path)
        except OSError as error:
            raise NotDenseError(f"has its weight offloaded to a file that cannot be read: {error}") from None
        return (str(path), stat.st_mtime_ns, stat.st_size, self.dtype)


def source(module: nn.Module) -> OffloadedWeight | None:
    """Locate the module's weight if accelerate offloads it; None if it does not."""
    if "_hf_hook" not in vars(module):
        return None
    hook = next((h for h in _hooks(module) if getattr(h, "offload", False)), None)
    weight = module._parameters.get("weight")
    if hook is None or weight is None or weight.device.type != "meta":
        return None
    weights, name = hook.weights_map, "weight"
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return OffloadedWeight(weights, name, hook.execution_device, weight.dtype)


def held(module: nn.Module, name: str) -> Tensor | None:
    """Return the module's parameter or buffer `name` if accelerate offloads it to the CPU's memory; else None."""
    weights: Any = next((h.weights_map for h in _hooks(module) if getattr(h, "offload", False)), None)
    while hasattr(weights, "prefix"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    in_memory = getattr(weights, "state_dict", weights)
    tensor = in_memory.get(name) if isinstance(in_memory, dict) else None
    return tensor if isinstance(tensor, Tensor) else None


def only_aligns_devices(module: nn.Module) -> bool:
    """True if the module's instance `forward` is accelerate's, around that of its class."""
    accelerate = sys.modules.get("accelerate.hooks")
    if accelerate is None or "_hf_hook" not in vars(module):
        return False
    inner = plain_function(getattr(module, "_old_forward", None))
    return inner is plain_function(type(module).forward) and all(
        type(hook) is accelerate.AlignDevicesHook for hook in _hooks(module)
    )


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))  # a SequentialHook has several
