"""Tensor parallelism: which heads this rank measures, the one sum over ranks that a forward needs, the profile of all ranks.

Everything here that talks to other ranks moves tensors, in the process group of the weights' mesh. What a rank does on its own
in a forward can fail there alone. Then the others wait for it in the next collective, the model's or the sum here, until the
group's timeout: it is the model's own way, and an agreement before each forward would cost a wait for the device.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastheads.backends.registry import AUTO, FACTORED, named
from fastheads.errors import BackendError, ForwardError, ResultsError, UnsupportedWeightError
from fastheads.models.sharding import Shard, shard_of
from fastheads.models.sites import HeadSite
from fastheads.stats.metric import NUM_NORMS
from fastheads.stats.metrics import METRICS, relative_to_layer
from fastheads.stats.moments import Moments, RunningMoments

# How far the mean of float64 ratios may be from 1.
SAME = 1e-9


class Ranks:
    """The ranks that share a model's heads. Each measures its own; what needs all of them, the mean over a layer's heads and
    the whole profile, is made here.

    The methods that say *collective* are to be called on every rank, in the same order, or the ranks that did wait for the
    others until the process group's timeout, as the model's own collectives do.
    """

    def __init__(self, shards: dict[int, Shard]) -> None:
        """`shards` by row: of the sites that are split over ranks, at least one. The others are the same on every rank."""
        self.shards = shards
        first = next(iter(shards.values()))
        if any(shard.mesh != first.mesh for shard in shards.values()):
            raise UnsupportedWeightError("the projections are sharded over several groups of ranks")
        self._group = first.mesh.get_group()
        self._size: int = first.mesh.size()
        self._device = first.device
        self._coordinate = first.mesh.get_local_rank()
        self._order = list(range(self._size))  # place in the group -> place in the mesh

    def own(self, sites: dict[int, HeadSite]) -> dict[int, HeadSite]:
        """The sites as this rank's projections serve them: with its heads alone."""
        return {
            row: replace(site, num_heads=self.shards[row].num_heads) if row in self.shards else site
            for row, site in sites.items()
        }

    def torch_backend(self, backend: str) -> str:
        """The backend that serves where `backend` is asked for. BackendError for a fused one: it makes a sample of all heads of
        a layer, and there is no rank that has them.
        """
        if backend == AUTO:
            return FACTORED.name
        if named(backend).needs == "form":
            raise BackendError(
                f"backend {backend!r} cannot be used with tensor parallelism: choose one of loop, einsum, factored, or auto"
            )
        return backend

    def whole_output(self, row: int) -> bool:
        """Whether this rank sees all that the projection of `row` gives."""
        return row not in self.shards or self.shards[row].whole_output

    def own_part(self, row: int, x: Tensor) -> Tensor:
        """What this rank's heads gave of an input `[..., width]` of the projection of `row`."""
        if not self._takes_all_heads(row):
            return x
        shard = self.shards[row]
        if x.shape[-1] != shard.num_heads * self._size * shard.head_dim:
            return x  # whoever measures it says what was expected
        start = shard.start * shard.head_dim
        # Contiguous: a view that is kept would keep all heads.
        return x[..., start : start + shard.num_heads * shard.head_dim].contiguous()

    def takes_own_heads(self, row: int) -> bool:
        """True if the projection's input on this rank is that of this rank's heads alone."""
        return not self._takes_all_heads(row)

    def _takes_all_heads(self, row: int) -> bool:
        """Whether the projection itself takes its part of an input of all heads."""
        return row in self.shards and self.shards[row].split_input

    def check_agreement(self, sites: Sequence[HeadSite], **options: Any) -> None:
        """Collective. Raises ResultsError, on every rank, where the ranks profile other sites or with other options."""
        said = repr(([(s.name, s.num_heads, s.head_dim) for s in sites], sorted(self.shards), options))
        digest = int.from_bytes(hashlib.sha256(said.encode()).digest()[:7], "big")
        answers = self._gathered(torch.tensor([digest, self._coordinate]))
        self._order = [int(answer[1]) for answer in answers]
        if len({int(answer[0]) for answer in answers}) > 1:
            raise ResultsError(
                "the ranks of a tensor-parallel model must attach with the same options, to the same sites: here rank "
                f"{self._coordinate} has {', '.join(f'{k}={v!r}' for k, v in options.items())}"
            )

    def relate(self, samples: Sequence[Tensor]) -> None:
        """Collective: the relative metrics of samples `[n, 4 or 6, rows, heads]`, in place; one all-reduce for all of them. Those
        that are there took this rank's heads for all.
        """
        if any(values.is_cuda for values in samples) and torch.cuda.is_current_stream_capturing():
            raise ForwardError("heads of a tensor-parallel model cannot be profiled in CUDA graphs")
        sums = [values[:, :NUM_NORMS].sum(dim=-1) for values in samples]  # [n, 2, rows]
        total = torch.cat([part.flatten() for part in sums])
        torch.distributed.all_reduce(total, group=self._group)
        parts = total.split([part.numel() for part in sums])
        for values, part, all_heads in zip(samples, sums, parts, strict=True):
            # Where every rank has all heads, each of them is in the sum once a rank: the mean is the same.
            mean = all_heads.view(part.shape) / (values.shape[-1] * self._size)
            values[:, NUM_NORMS : 2 * NUM_NORMS] = relative_to_layer(
                values[:, :NUM_NORMS], mean.unsqueeze(-1)
            )

    def whole(self, measured: Callable[[], tuple[Moments, Tensor | None]]) -> tuple[Moments, Tensor | None]:
        """Collective: the moments of the whole model `[metrics, rows, heads]`, and its mean vectors `[rows, heads, 4 + head_dim]`
        if they are measured, the same bits on every rank, from the ones that `measured` gives here, this rank's heads first in
        each row; those of `METRICS` come first. CPU tensors.

        Raises ResultsError, on every rank, where `measured` raised on another one (here its own error is raised), or where
        the ranks did not count the same samples.
        """
        failure: Exception | None = None
        try:
            here, vectors = measured()
        except Exception as error:  # the others wait for this rank
            failure = error
        failed = [bool(flag) for flag in self._gathered(torch.tensor([failure is not None]))]
        if failure is not None:
            raise failure
        if any(failed):
            ranks = ", ".join(str(place) for place, flag in zip(self._order, failed, strict=True) if flag)
            raise ResultsError(
                f"rank {ranks} of the tensor-parallel group could not give its results; its own error says why"
            )
        # As bits, so that one tensor holds counts and values.
        bits = torch.stack([plane.view(torch.int64) for plane in here])  # [planes, metrics, rows, heads]
        answers = self._gathered(bits)
        by_rank = [answers[self._order.index(rank)] for rank in range(self._size)]
        _, metrics, rows, heads = bits.shape
        everyone = RunningMoments(metrics, rows, heads, torch.device("cpu"))
        # [rows, heads, planes, metrics], of this rank's heads and of all
        self._place_heads(
            [part.permute(2, 3, 0, 1) for part in by_rank],
            everyone.buffer.view(torch.int64).permute(2, 3, 0, 1),
        )
        self._check_same_forwards(by_rank, everyone.views())
        if vectors is None:
            return everyone.views(), None
        answers = self._gathered(vectors.view(torch.int64))
        whole = torch.zeros_like(vectors)
        by_rank = [answers[self._order.index(rank)] for rank in range(self._size)]
        self._place_heads(by_rank, whole.view(torch.int64))
        return everyone.views(), whole

    def _place_heads(self, by_rank: list[Tensor], target: Tensor) -> None:
        """Put the heads of each rank `[rows, heads, ...]` in their place among all."""
        for row in range(target.shape[0]):
            shard = self.shards.get(row)
            if shard is None:
                target[row] = by_rank[0][row]  # the same on every rank: counted once
                continue
            n = shard.num_heads
            for rank, part in enumerate(by_rank):
                target[row, rank * n : (rank + 1) * n] = part[row, :n]

    def _check_same_forwards(self, by_rank: list[Tensor], everyone: Moments) -> None:
        """Raises ResultsError where the ranks have samples of different forwards."""
        samples = [part[0, 0, :, 0] + part[1, 0, :, 0] for part in by_rank]  # count + nonfinite, [rows]
        if any(not torch.equal(samples[0], other) for other in samples[1:]):
            numbers = ", ".join(f"{int(n.max())} on rank {rank}" for rank, n in enumerate(samples))
        else:
            # As many of other forwards: then the relative metrics of a layer's heads do not average to 1 any more.
            numbers = "as many of others"
            for row, shard in self.shards.items():
                heads = (slice(NUM_NORMS, len(METRICS)), row, slice(shard.num_heads * self._size))
                finite = (everyone.count[heads] > 0).all() and not everyone.nonfinite[heads].any()
                if finite and (everyone.mean[heads].mean(dim=-1) - 1).abs().max() > SAME:
                    break
            else:
                return
        raise ResultsError(
            f"the ranks did not count the same forwards ({numbers}, in samples of a site): an error ended one on some ranks "
            "only. Call reset() on every rank and profile again"
        )

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` of every rank of the group, on the CPU."""
        here = tensor.to(self._device).contiguous()
        everyone = [torch.empty_like(here) for _ in range(self._size)]
        torch.distributed.all_gather(everyone, here, group=self._group)
        return [answer.cpu() for answer in everyone]


def ranks_of(sites: dict[int, HeadSite]) -> Ranks | None:
    """The ranks that share the heads of `sites` (by row); None where every rank has all of them.

    Raises UnsupportedWeightError for sites that are shared in a way that is not supported.
    """
    shards = {row: shard for row, site in sites.items() if (shard := shard_of(site)) is not None}
    return Ranks(shards) if shards else None
