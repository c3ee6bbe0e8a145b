"""Ablate heads: replace them by zero, or by their mean output, in a model that runs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastheads.errors import OptionError, ResultsError
from fastheads.intervene.gates import Gate, GateHandle
from fastheads.intervene.pairs import whole_pair
from fastheads.models.sharding import shard_of
from fastheads.models.sites import find_sites, has_known_layout, is_sequence_first, unwrapped
from fastheads.models.weights import dense_weight
from fastheads.results.head_profile import HeadProfile
from fastheads.results.vectors import checked_sites

Mode = Literal["zero", "mean"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Heads = Iterable[tuple[int, int]]


def ablate(
    model: nn.Module,
    heads: Heads,
    mode: Mode = "zero",
    *,
    means: HeadProfile | None = None,
    include: str | Iterable[str] = (),
) -> "Ablation":
    """Return a context in which the heads are replaced by zero, or by their mean output, wherever the model runs.

        with fastheads.ablate(model, profile.lowest(0.1)):
            loss = model(**batch, labels=batch["input_ids"]).loss

    The head's part of the output projection's input is replaced, at every position (padding too, where it matters to no valid
    token); weights are not touched, and nothing is copied. What a HookManager measures meanwhile is what acts, whichever of the
    two is attached first. Contexts may be nested: where they name the same head, the one entered last decides. It works in
    `generate()` and under torch.compile, for code compiled before and within. A copy that is made of the model inside the context
    is not ablated. Calls of the projection as a module are what it acts on: a CUDA graph that was captured outside by hand is
    replayed as it was, and code that calls the projection's `forward`, or reads its weight, is not seen.

    The projections are changed for all threads that run the model: enter and leave the context while no other thread does.

    Args:
        model: a model whose heads can be profiled, loaded in any way that profiling supports. Of a tensor-parallel model every
            rank enters the context, for the same heads.
        heads: pairs (layer, head) as in `find_sites` and `HeadProfile`.
        mode: "zero" or "mean".
        means: for mode "mean": a profile of these weights with mean vectors.
        include: as for `find_sites`: attention modules that are left out by default.

    Raises:
        OptionError: a pair names no head of the model, or the arguments do not fit each other.
        ResultsError: `means` has no mean vectors, or not of all these heads, or is of another model or other weights.
        NoSitesError, UnsupportedWeightError: the model, or one of the projections, cannot be profiled.
    """
    return Ablation(_Heads(model, mode, means, include), [heads], rows=False)


class Ablation(AbstractContextManager["Ablation"]):
    """The context that `ablate` returns. It may be entered again once it was left."""

    def __init__(self, of: "_Heads", sets: Sequence[Heads], *, rows: bool) -> None:
        self.sets = [of.checked(heads) for heads in sets]
        self._gates = of.gates(self.sets, rows=rows)
        self._modules = {site.name: site.module for site in of.sites if site.name in self._gates}
        self._handle: GateHandle | None = None

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The heads that are ablated, as sorted pairs (layer, head)."""
        return sorted({pair for heads in self.sets for pair in heads})

    def __enter__(self) -> Self:
        if self._handle is not None:
            raise OptionError("this ablation is entered already: make another one")
        self._handle = GateHandle(self._modules, self._gates)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()


class Ablator:
    """Makes ablations of one model, which it checks once. For several that follow one another, and for rows of a batch."""

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "zero",
        means: HeadProfile | None = None,
        include: str | Iterable[str] = (),
    ) -> None:
        """Arguments and errors are those of `ablate`."""
        self._heads = _Heads(model, mode, means, include)
        self.sites = self._heads.sites

    def ablate(self, heads: Heads) -> Ablation:
        """As `ablate()`."""
        return Ablation(self._heads, [heads], rows=False)

    @property
    def takes_rows(self) -> bool:
        """True if `ablate_rows` is known to work: the attention passes the batch as one dimension of the projection's input."""
        return self._heads.batched()

    def ablate_rows(self, sets: Sequence[Heads]) -> Ablation:
        """Return a context in which row i of each batch has the heads `sets[i]` ablated. Each batch must have `len(sets)` rows.

        Raises:
            OptionError: it is unknown which dimension of the projection's input is the batch.
        """
        return Ablation(self._heads, sets, rows=True)


class _Heads:
    """The heads of one model, and what they may be replaced with."""

    def __init__(
        self, model: nn.Module, mode: str, means: HeadProfile | None, include: str | Iterable[str]
    ) -> None:
        if mode not in get_args(Mode):
            raise OptionError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
        if (mode == "mean") != (means is not None):
            raise OptionError(
                "mode 'mean' needs means=, a profile of this model with mean vectors"
                if mode == "mean"
                else "means= is for mode 'mean'"
            )
        self._model = unwrapped(model)
        self._means: HeadProfile | None = None
        if means is None:
            self.sites = find_sites(self._model, include)
        else:
            if not isinstance(means, HeadProfile):
                raise OptionError(f"means must be a HeadProfile, not {type(means).__name__}")
            if means.vectors is None:
                raise ResultsError("this profile has no mean vectors: profile with vectors=True")
            self._means = means
            self.sites = checked_sites(means, self._model)
        self._rows: dict[int, list[int]] = {}
        for row, site in enumerate(self.sites):
            self._rows.setdefault(site.layer, []).append(row)
        self._projections: dict[int, _Projection] = {}  # by row

    def checked(self, heads: Heads) -> list[tuple[int, int]]:
        """Return the pairs, each once, as plain integers. Raises OptionError or ResultsError for one that cannot be ablated."""
        if isinstance(heads, str | bytes | Mapping) or not isinstance(heads, Iterable):
            raise OptionError(f"heads must be pairs (layer, head), not {heads!r}")
        return list(dict.fromkeys(self._checked_pair(pair) for pair in heads))

    def _checked_pair(self, pair: Any) -> tuple[int, int]:
        layer, head = whole_pair(pair, "heads", "(layer, head)")
        rows = self._rows.get(layer, [])
        if not rows:
            layers = sorted(self._rows)
            raise OptionError(
                f"no layer {layer} to ablate head {head} of: the model has {len(layers)} layers with heads, {layers[0]} to "
                f"{layers[-1]}"
            )
        if len(rows) > 1:
            names = ", ".join(self.sites[row].name for row in rows)
            raise OptionError(
                f"layer {layer} has several output projections, so that {(layer, head)} is ambiguous: {names}"
            )
        site = self.sites[rows[0]]
        if not 0 <= head < site.num_heads:
            raise OptionError(
                f"no head {head} in layer {layer}, which has the heads 0 to {site.num_heads - 1}"
            )
        if self._means is not None and self._vectors.count[rows[0], head] == 0:
            raise ResultsError(
                f"head {head} of layer {layer} has no mean vector: no token of it was measured"
            )
        return layer, head

    @property
    def _vectors(self) -> Any:
        assert self._means is not None
        return self._means.vectors

    def batched(self) -> bool:
        return all(has_known_layout(self._model, site) for site in self.sites)

    def gates(self, sets: Sequence[Sequence[tuple[int, int]]], *, rows: bool) -> dict[str, Gate]:
        """Make the gates by the names of their sites: for all rows of a batch, or if `rows` with one of `sets` for each."""
        by_row: dict[int, Tensor] = {}
        for n, heads in enumerate(sets):
            for layer, head in heads:
                (row,) = self._rows[layer]
                if row not in by_row:
                    by_row[row] = torch.zeros(len(sets), self.sites[row].num_heads, dtype=torch.bool)
                by_row[row][n, head] = True
        return {
            self.sites[row].name: self._gate(row, mask, rows=rows) for row, mask in sorted(by_row.items())
        }

    def _gate(self, row: int, mask: Tensor, *, rows: bool) -> Gate:
        """`mask`: bool [sets, heads]."""
        about, head_dim = self._about(row), self.sites[row].head_dim
        if rows and not about.batched:
            raise OptionError(
                f"{self.sites[row].name}: it is unknown which dimension of its input is the batch"
            )
        mask = mask[:, about.heads]
        fill = exact = None
        # Not as inference tensors, which a forward with gradients could not use.
        with torch.inference_mode(False), torch.no_grad():
            if self._means is not None:
                mean = np.array(self._vectors.mean[row, about.heads, :head_dim], order="C")
                mean[~mask.any(0).numpy()] = 0.0  # not used, and NaN without tokens
                exact = torch.from_numpy(mean)
                if about.device.type == "mps":
                    exact = exact.float()  # MPS has no float64
                exact = exact.to(about.device)
                fill = exact.to(about.dtype)
            shape = (-1, 1, mask.shape[1], 1) if about.batch_dim == 0 else (1, -1, mask.shape[1], 1)
            mask = mask.reshape(shape) if rows else mask[0].reshape(-1, 1)
            return Gate(
                mask=mask.to(about.device, copy=True),
                fill=fill,
                exact=exact,
                heads=mask.shape[-2],
                head_dim=head_dim,
                rows=mask.shape[about.batch_dim] if rows else None,
                batch_dim=about.batch_dim,
            )

    def _about(self, row: int) -> "_Projection":
        """Return what a gate must know of the projection. Raises UnsupportedWeightError if it cannot be profiled."""
        if row not in self._projections:
            site = self.sites[row]
            shard = shard_of(site)
            local = site if shard is None else replace(site, num_heads=shard.num_heads)
            with torch.no_grad():
                dense_weight(local)  # raises if it is unsupported
            split = shard is None or shard.split_input  # the input has the heads of all ranks
            start = 0 if split or shard is None else shard.start
            device, dtype = _place(site.module)
            self._projections[row] = _Projection(
                heads=slice(start, start + (site if split else local).num_heads),
                batched=has_known_layout(self._model, site),
                batch_dim=1 if is_sequence_first(self._model, site) else 0,
                device=device,
                dtype=dtype,
            )
        return self._projections[row]


@dataclass(frozen=True)
class _Projection:
    """A projection as it is run here."""

    heads: slice  # those in its input
    batched: bool  # True: `batch_dim` is known
    batch_dim: int  # of its input
    device: torch.device  # probably those of its input
    dtype: torch.dtype


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype that the projection's input probably has; another one costs a conversion in each call."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"]
    device = tensors[0].device if tensors else torch.device("cpu")
    return device, next((t.dtype for t in tensors if t.dtype in DTYPES), torch.get_default_dtype())
