"""Find how tensor parallelism splits a projection's weight over ranks.

Supported is only what transformers makes: a projection run by `RowwiseParallel`, its weight a DTensor split by columns on a mesh
of one dimension. Other layouts (FSDP2, HSDP, FSDP with tensor parallelism) split or gather the weight in ways that its placements
do not show.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastheads.errors import UnsupportedWeightError
from fastheads.models.sites import HeadSite
from fastheads.models.weight_formats import (
    NotDenseError,
    is_dtensor,
    plain_forward,
    plain_function,
    qualified_name,
)

# The instance `forward` that transformers sets on a parallel module, and the style that splits a weight by columns: by heads, in
# an output projection.
PARALLEL_FORWARD = "TensorParallelLayer.install_forward.<locals>.tp_forward"
ROWWISE = "transformers.distributed.tensor_parallel.RowwiseParallel"


@dataclass(frozen=True)
class Shard:
    """The heads of one projection that this rank holds: `start` to `start + num_heads`, the same number on every rank."""

    start: int
    num_heads: int
    head_dim: int
    split_input: bool  # True: the projection's input has the heads of all ranks, of which it takes its own
    whole_output: bool  # True: its output is the sum over all ranks, as a plain tensor
    mesh: Any = field(compare=False)
    device: torch.device = field(compare=False)


def is_rowwise(module: nn.Module) -> bool:
    """True if the module is a linear layer that transformers runs on this rank's columns of its weight."""
    return _rowwise(module) is not None and plain_forward(module) and is_dtensor(_weight(module))


def check_layout(module: nn.Module) -> None:
    """Raise NotDenseError, naming the placements, if the weight is split over ranks in any way but that of `Shard`."""
    weight = _weight(module)
    placements = weight.placements
    if not is_rowwise(module):
        raise NotDenseError(
            f"has its weight sharded over ranks ({placements}) in a way that is not supported: only the tp_plan of transformers "
            "5.18 and later is, with a plain torch.nn.Linear. Profile a model that is whole on each rank"
        )
    if weight.device_mesh.ndim != 1 or not (len(placements) == 1 and placements[0].is_shard(1)):
        raise NotDenseError(
            f"has its weight sharded over ranks ({placements} on {weight.device_mesh}): tensor parallelism is supported only for "
            "a weight split by columns on a mesh of one dimension"
        )


def shard_of(site: HeadSite) -> Shard | None:
    """Return the heads of the projection that this rank holds; None if it is not run by `RowwiseParallel`.

    Raises UnsupportedWeightError, naming the site, for a layout that is not supported.
    """
    module = site.module
    if not is_rowwise(module):
        return None
    try:
        check_layout(module)
    except NotDenseError as error:
        raise UnsupportedWeightError(f"{site.name} {error}") from None
    weight, style = _weight(module), _rowwise(module)
    assert style is not None
    mesh, local = weight.device_mesh, weight.to_local()
    heads, rest = divmod(site.num_heads, mesh.size())
    if rest or local.shape[1] != heads * site.head_dim:
        raise UnsupportedWeightError(
            f"{site.name} has {site.num_heads} heads of {site.head_dim} over {mesh.size()} ranks, which cuts heads in two: "
            "use a number of ranks that divides the number of heads"
        )
    split_input = not style.input_layouts.is_shard()
    whole_output = style.output_layouts.is_replicate() and style.use_local_output
    return Shard(
        start=mesh.get_local_rank() * heads,
        num_heads=heads,
        head_dim=site.head_dim,
        split_input=split_input,
        whole_output=whole_output,
        mesh=mesh,
        device=local.device,
    )


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _rowwise(module: nn.Module) -> Any:
    """Return transformers' `RowwiseParallel` style of the module; None if it has none."""
    forward = vars(module).get("forward")
    code = getattr(forward, "__code__", None)
    if forward is None or code is None or code.co_qualname != PARALLEL_FORWARD:
        return None
    held = inspect.getclosurevars(forward).nonlocals
    # It may wrap another library's forward, such as accelerate's.
    if plain_function(held.get("original_forward")) is not plain_function(type(module).forward):
        return None
    style = held.get("self")
    return style if qualified_name(type(style)) == ROWWISE else None
