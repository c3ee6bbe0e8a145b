"""How a projection's weight is split over ranks by tensor parallelism.

Only what transformers itself makes is taken: a projection that runs its `RowwiseParallel`, its weight a DTensor split over the
columns, on a mesh of one dimension. The other layouts over ranks (FSDP2, HSDP, FSDP with tensor parallelism) split or gather the
weight in ways that its placements alone do not tell.
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

# What transformers sets as the forward of a module that it makes parallel, and the style of those whose weight is split by
# columns: by the heads, for an output projection.
PARALLEL_FORWARD = "TensorParallelLayer.install_forward.<locals>.tp_forward"
ROWWISE = "transformers.distributed.tensor_parallel.RowwiseParallel"


@dataclass(frozen=True)
class Shard:
    """The heads of one projection that this rank serves: `start` to `start + num_heads`, where every rank serves as many."""

    start: int
    num_heads: int
    head_dim: int
    split_input: bool  # the projection is given the heads of all ranks, and takes its own of them
    whole_output: bool  # each rank gets the sum over all ranks, as a plain tensor
    mesh: Any = field(compare=False)
    device: torch.device = field(compare=False)


def is_rowwise(module: nn.Module) -> bool:
    """Whether the module is a linear layer that transformers runs on this rank's columns of its weight."""
    return _rowwise(module) is not None and plain_forward(module) and is_dtensor(_weight(module))


def check_layout(module: nn.Module) -> None:
    """Raises NotDenseError, naming the placements, for a weight that is over ranks in another way than `Shard` says."""
    weight = _weight(module)
    placements = weight.placements
    if not is_rowwise(module):
        raise NotDenseError(
            f"has its weight sharded over ranks ({placements}) in a way that is not supported: of FSDP2, tensor parallelism "
            "and their like, only the tp_plan of transformers 5.18 and later is, with a plain torch.nn.Linear. Profile a model "
            "that is whole on each rank"
        )
    if weight.device_mesh.ndim != 1 or not (len(placements) == 1 and placements[0].is_shard(1)):
        raise NotDenseError(
            f"has its weight sharded over ranks ({placements} on {weight.device_mesh}): of tensor parallelism only a mesh of "
            "one dimension is supported, and a weight split by its columns"
        )


def shard_of(site: HeadSite) -> Shard | None:
    """What this rank serves of the projection; None where each rank serves all of it, or the weight is nothing known.

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
            "a number of ranks that divides the heads is needed"
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
    """The style in which transformers runs a projection that it has split by heads; None of another module."""
    forward = vars(module).get("forward")
    code = getattr(forward, "__code__", None)
    if forward is None or code is None or code.co_qualname != PARALLEL_FORWARD:
        return None
    held = inspect.getclosurevars(forward).nonlocals
    # The one that it wraps may be another's: accelerate's, say.
    if plain_function(held.get("original_forward")) is not plain_function(type(module).forward):
        return None
    style = held.get("self")
    return style if qualified_name(type(style)) == ROWWISE else None
