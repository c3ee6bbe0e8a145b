"""The backends by name: those of the package, and those that other packages register."""

import re
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastheads.backends.protocol import Backend, FusedBackend, NormsBackend, NormsNeeds
from fastheads.backends.torch_paths import Einsum, Factored, Loop
from fastheads.backends.triton import Triton
from fastheads.errors import BackendError, OptionError

AUTO = "auto"
FACTORED, TRITON = Factored(), Triton()
_BACKENDS: dict[str, NormsBackend | FusedBackend] = {
    backend.name: backend for backend in (Loop(), Einsum(), FACTORED, TRITON)
}
_registered: dict[str, object] = {}  # as their owners gave them

# Names are joined with "+" in a profile's metadata, and with commas in messages.
_NAME = re.compile(r"[A-Za-z][\w.-]*")

T = TypeVar("T")


def register_backend(backend: T) -> T:
    """Make a backend of your own usable by name: `HookManager(model, backend="its-name")`. "auto" never picks it.

    `backend` is an object, or a class that is made without arguments (so that this may decorate it), with

    - `name`: letters, digits, `_`, `-` and `.`; not one that is taken.
    - `unsupported(device, dtype, head_dim) -> str | None`: why it does not serve such inputs (the end of "cannot be used: ...");
      None where it does. It is asked when a HookManager attaches, and for each new kind of input.
    - `contribution_norms(x, weights) -> Tensor`: the norms ‖W_h z_h‖ `[G, N, heads]`, in floating point (float64 is kept), of N
      tokens of G projections of one shape. `x` `[G, N, heads * head_dim]` is their input in float32 (float64 for a float64
      model); it may be the model's own memory and must not be changed. `weights` `[G, hidden, heads, head_dim]` is on the same
      device, in its own dtype. A call gets a part of the tokens, of any number.
    - optionally `needs = "factor"`: `weights` is then the lower-triangular L `[G, heads, head_dim, head_dim]` with
      W_hᵀW_h = L_h L_hᵀ, hence ‖W_h z‖ = ‖z L_h‖: built once, and again when the weight changes.
    - optionally `missing() -> str | None`: why it cannot work here at all.

    Padding, aggregation over tokens, the other metrics and the moments are the library's. Returns `backend`.

    Raises:
        OptionError: the name is taken by another object, or something above is not there.
    """
    found = _Registered(backend() if isinstance(backend, type) else backend)
    if found.name == AUTO or (found.name in _BACKENDS and _registered.get(found.name) is not backend):
        raise OptionError(f"the backend name {found.name!r} is taken: register yours under another")
    if found.name not in _BACKENDS:
        _BACKENDS[found.name], _registered[found.name] = found, backend
    return backend


class _Registered:
    """A backend of another package, with defaults for what it leaves out; what it returns is checked."""

    def __init__(self, backend: Any) -> None:
        name, needs = getattr(backend, "name", None), getattr(backend, "needs", "weight")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError(
                f"a backend's name must be letters, digits, '_', '-' and '.', and begin with a letter, not {name!r}"
            )
        if needs not in ("weight", "factor"):
            raise OptionError(f"backend {name!r}: needs must be 'weight' or 'factor', not {needs!r}")
        for method in ("unsupported", "contribution_norms"):
            if not callable(getattr(backend, method, None)):
                raise OptionError(f"backend {name!r} must have a method {method!r}")
        self.name: str = name
        self.needs: NormsNeeds = "factor" if needs == "factor" else "weight"
        self._backend = backend

    def missing(self) -> str | None:
        reason: str | None = self._backend.missing() if hasattr(self._backend, "missing") else None
        return reason

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        reason: str | None = self._backend.unsupported(device, dtype, head_dim)
        return reason

    def contribution_norms(self, x: Tensor, weights: Tensor) -> Tensor:
        norms = self._backend.contribution_norms(x, weights)
        heads = weights.shape[2 if self.needs == "weight" else 1]
        shape = (*x.shape[:2], heads)
        # A wrong shape may broadcast: then the numbers would be wrong and nothing would say so.
        if not isinstance(norms, Tensor) or norms.shape != shape or not norms.is_floating_point():
            got = (
                f"{norms.dtype} {list(norms.shape)}"
                if isinstance(norms, Tensor)
                else f"a {type(norms).__name__}"
            )
            raise BackendError(
                f"backend {self.name!r} must return floating-point norms {list(shape)}, not {got}"
            )
        return norms.detach()


def backend_names() -> tuple[str, ...]:
    """Return the names that `backend=` accepts, "auto" first."""
    return (AUTO, *_BACKENDS)


def named(name: str) -> NormsBackend | FusedBackend:
    """The backend of that name, which is not "auto". Raises OptionError where there is none."""
    backend = _BACKENDS.get(name) if isinstance(name, str) else None
    if backend is None:
        raise OptionError(f"unknown backend {name!r}: choose one of {', '.join(backend_names())}")
    return backend


def check_backend(name: str) -> None:
    """Raise OptionError for an unknown name, BackendError for a backend that cannot work here at all."""
    if name != AUTO and (reason := named(name).missing()) is not None:
        raise _cannot_be_used(name, reason)


def backend_for(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> NormsBackend | FusedBackend:
    """The backend for such inputs: the one asked for, or what "auto" takes: the kernel on GPUs that it serves, else the factor.

    Raises as `check_backend` does, and BackendError where the one asked for cannot serve them.
    """
    if name == AUTO:
        return (
            TRITON if device.type == "cuda" and _reason(TRITON, device, dtype, head_dim) is None else FACTORED
        )
    backend = named(name)
    reason = _reason(backend, device, dtype, head_dim)
    if reason is not None:
        raise _cannot_be_used(name, reason)
    return backend


def without_fused(name: str) -> str:
    """Return "auto" in place of the name of a fused backend, and any other name as it is."""
    return AUTO if name != AUTO and named(name).needs == "form" else name


def _reason(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = backend.missing()
    return backend.unsupported(device, dtype, head_dim) if reason is None else reason


def _cannot_be_used(name: str, reason: str) -> BackendError:
    others = [other.name for other in _BACKENDS.values() if other.name != name and other.missing() is None]
    return BackendError(
        f"backend {name!r} cannot be used: {reason}; choose one of {', '.join(others)}, or auto"
    )
