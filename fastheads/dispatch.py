"""Which backend serves which tensor."""

import importlib
import importlib.util

from torch import Tensor

TORCH_BACKENDS = ("loop", "einsum", "factored")
BACKENDS = ("auto", *TORCH_BACKENDS, "triton")
PRECISIONS = ("exact", "fast")


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown name, RuntimeError for a backend that cannot work here at all."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "triton" and (reason := _triton_missing()):
        raise RuntimeError(
            f"backend 'triton' cannot be used: {reason}; choose one of {', '.join(TORCH_BACKENDS)}"
        )


def backend_for(backend: str, x: Tensor, head_dim: int) -> str:
    """The backend for an input: the one asked for, or what "auto" takes. Raises RuntimeError where "triton" cannot serve x."""
    if backend in TORCH_BACKENDS:
        return backend
    if backend == "auto" and x.device.type != "cuda":
        return "factored"
    reason = _triton_missing()
    if reason is None:
        reason = importlib.import_module("fastheads.kernels").unsupported(x.device, x.dtype, head_dim)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "factored"
    raise RuntimeError(f"backend 'triton' cannot serve {x.dtype} on {x.device}: {reason}")


def _triton_missing() -> str | None:
    for module in ("triton", "fastheads.kernels"):
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:
            found = False
        if not found:
            return f"{module} is not installed"
    return None
