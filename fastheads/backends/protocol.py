"""Protocols of backends: one computes norms of contributions; a fused one updates the moments itself.

Shapes: G inputs of one shape, N tokens, `x` [G, N, heads * head_dim], `weights` as the backend's `needs` says.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# What a norms backend computes with, of G projections of one shape. "weight": W [G, hidden, heads, head_dim] in its own dtype,
# read again each time. "factor": the lower-triangular L [G, heads, head_dim, head_dim] with W_hᵀW_h = L_h L_hᵀ, so that
# ‖W_h z‖ = ‖z L_h‖; it is built once and follows the weight.
NormsNeeds = Literal["weight", "factor"]


class Backend(Protocol):
    """The interface of every backend in the registry."""

    name: str  # in `HookManager(model, backend=name)`

    def missing(self) -> str | None:
        """Why it cannot work here at all, whatever the inputs; None where it can."""

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it does not serve inputs of this device, dtype and head_dim; None where it does."""


class NormsBackend(Backend, Protocol):
    """A backend that computes norms; the samples are made of them."""

    needs: NormsNeeds

    def contribution_norms(self, x: Tensor, weights: Tensor) -> Tensor:
        """‖W_h z‖ of each token and head, `[G, N, heads]`, for `x` in float32 (float64 for a float64 model).

        `x` may be the model's own memory: it must not be changed. N is a slice of all tokens, of any size.
        """


class FusedBackend(Backend, Protocol):
    """A backend that takes inputs to updated moments by itself. It needs all heads of a layer on one device."""

    needs: Literal["form"]  # what `prepare` makes of the factor

    def prepare(self, lower: Tensor, dtype: torch.dtype, precision: str) -> Any:
        """The form in which it reads the factor L, float64 `[heads, head_dim, head_dim]`, for inputs of `dtype`."""

    def record(
        self,
        inputs: Sequence[Tensor],
        forms: Sequence[Any],
        state: Tensor,
        rows: Sequence[int],
        *,
        token_agg: str,
        valid: Tensor | None,
        skip_first: int,
        scale: Tensor | None,
        ratio: Tensor | None,
        vectors: Tensor | None,
    ) -> "Launch | None":
        """Merge the samples of `inputs` `[B, S, width]` into `state`, and their tokens into `vectors`, as
        `fastheads.kernels.head_stats` does. Returns the launch, if it can be made again.
        """

    def token_norms(self, inputs: Sequence[Tensor], forms: Sequence[Any], *, scale: Tensor | None) -> Tensor:
        """‖z‖ and ‖W z‖ of every token, `[G, 2, heads, B * S]`."""


class Launch(Protocol):
    """A launch that was made once, to be made again for other inputs of the same form."""

    extent: int  # bytes from the first of an input to beyond its last
    factors: tuple[Any, ...]  # the forms that it reads

    def matches(
        self,
        inputs: Sequence[Tensor],
        valid: Tensor | None,
        skip_first: int,
        *,
        is_scaled: bool = False,
        has_ratio: bool = False,
    ) -> list[int] | None:
        """Return the inputs' addresses for `run`; None if this launch does not serve them."""

    def run(
        self,
        addresses: Sequence[int],
        state: Tensor,
        valid: Tensor | None,
        *,
        scale: Tensor | None = None,
        ratio: Tensor | None = None,
        scratch: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> bool:
        """Launch at these addresses. Returns False, and does nothing, if one of the tensors cannot be read."""

    def new_scratch(self) -> Tensor:
        """Make memory to be kept from `run` to `run` on one stream; without it each run makes its own."""
