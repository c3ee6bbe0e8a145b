"""The backend "triton": the fused kernel. `fastheads.kernels` is imported when it is first used, where triton is installed."""

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fastheads.backends.protocol import Launch


@cache
def kernels() -> Any:
    """`fastheads.kernels`, which imports triton."""
    return importlib.import_module("fastheads.kernels")


class Triton:
    """One kernel reads x once and updates the moments. CUDA tensors, or those of a CPU under TRITON_INTERPRET=1."""

    name = "triton"
    needs: Literal["form"] = "form"

    def missing(self) -> str | None:
        """The module that is not installed."""
        for module in ("triton", "fastheads.kernels"):
            try:
                found = importlib.util.find_spec(module) is not None
            except ImportError:
                found = False
            if not found:
                return f"{module} is not installed"
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the kernel does not serve such inputs."""
        reason: str | None = kernels().unsupported(device, dtype, head_dim)
        return reason

    def prepare(self, lower: Tensor, dtype: torch.dtype, precision: str) -> Any:
        """The factor as the kernel reads it (`fastheads.kernels.KernelFactor`)."""
        return kernels().prepare(lower, dtype, precision)

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
    ) -> Launch | None:
        """Launch the kernel: merge the samples of `inputs` into `state`, and their tokens into `vectors`. Returns the launch, if
        it can be made again.
        """
        launch: Launch | None = kernels().head_stats(
            inputs,
            forms,
            state,
            rows,
            token_agg=token_agg,
            valid=valid,
            skip_first=skip_first,
            scale=scale,
            ratio=ratio,
            vectors=vectors,
        )
        return launch

    def token_norms(self, inputs: Sequence[Tensor], forms: Sequence[Any], *, scale: Tensor | None) -> Tensor:
        """‖z‖ and ‖W z‖ of every token, float32 `[G, 2, heads, B * S]`: 8 bytes a head beside the one read of x."""
        norms: Tensor = kernels().token_norms(inputs, forms, scale=scale)
        return norms
