"""The HookManager: attach, the life of one forward, detach.

A forward counts once or not at all. Its start copies the committed moments to pending ones, its samples go there, its normal end
copies them back; what an exception leaves in the pending moments, the next start overwrites.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastheads.dispatch import PRECISIONS, backend_for, check_backend
from fastheads.metadata import describe
from fastheads.metrics import (
    METRICS,
    TOKEN_AGGS,
    ContributionNorms,
    einsum_norms,
    factored_norms,
    loop_norms,
    samples,
)
from fastheads.moments import CommittedMoments, Moments
from fastheads.numerics import exact_arithmetic
from fastheads.results import HeadProfile
from fastheads.sites import HeadSite, decoder_of, find_sites, unwrapped
from fastheads.tokens import DecoderArguments, RealTokens
from fastheads.weights import SiteFactor, StaleFactorError, dense_weight


class HookManager:
    """Profiles every attention head of `model` while it runs, without changing the run.

    Attaches in the constructor; `remove()`, or leaving the `with` block, detaches. Nothing of a batch is retained.

    Args:
        model: a transformers model, or any module with attention output projections named `o_proj`. DataParallel, DDP and
            torch.compile wrappers are looked through.
        token_agg: what one sample is. "last": a sequence's value at its last real token; "all": the mean of the value over the
            sequence's real tokens; "token": each real token.
        layers: profile only the sites of these layers (None: all). Rows of the results are those of `find_sites(model)` all the
            same; the others have count 0.
        backend: "auto", "loop", "einsum", "factored" or "triton".
        precision: "exact" or "fast"; only "triton" has a faster way to be less exact.
        skip_first: leave out the first real tokens of each sequence (1 leaves the attention sink out).

    Raises:
        NoSitesError: the model has nothing to profile.
        UnsupportedWeightError: a projection's dense weight cannot be had with certainty.
        ValueError, RuntimeError: an option is unknown, or the backend asked for cannot work here.
    """

    def __init__(
        self,
        model: nn.Module,
        token_agg: str = "last",
        *,
        layers: Iterable[int] | None = None,
        backend: str = "auto",
        precision: str = "exact",
        skip_first: int = 0,
    ) -> None:
        if token_agg not in TOKEN_AGGS:
            raise ValueError(f"unknown token_agg {token_agg!r}: choose one of {', '.join(TOKEN_AGGS)}")
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
            raise ValueError(f"skip_first must be a whole number of tokens, 0 or more, not {skip_first!r}")
        check_backend(backend)
        self.model = unwrapped(model)
        self.token_agg, self.backend, self.precision, self.skip_first = (
            token_agg,
            backend,
            precision,
            skip_first,
        )
        self.sites = find_sites(self.model)
        self.layers = None if layers is None else sorted(set(layers))
        self._profiled = _choose(self.sites, self.layers)
        self._max_heads = max(site.num_heads for site in self.sites)
        self._decoder = decoder_of(self.model)
        self._arguments = DecoderArguments(self._decoder)
        self._factors: dict[int, SiteFactor] = {}
        self._moments: dict[torch.device, CommittedMoments] = {}
        self._backends_used: set[str] = set()
        self._running: nn.Module | None = None  # the outermost module of the forward under way
        self._real: RealTokens | None = None  # the real tokens of the decoder's call under way
        self._paused = False
        self._warned = False
        self._handles: list[Any] = []
        for row, site in self._profiled:
            weight = dense_weight(site)  # raises where it cannot be had: now, not in the middle of a run
            self._moments_on(weight.device)
            if backend in ("auto", "factored", "triton"):
                self._factors[row] = SiteFactor(site)
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    # ------------------------------------------------------------------ attach, detach

    def _attach(self) -> None:
        for module in {id(m): m for m in (self.model, self._decoder)}.values():
            self._handles += (
                module.register_forward_pre_hook(self._start, with_kwargs=True),
                module.register_forward_hook(self._finish),
                # Runs after an exception too, where the one above has not closed the forward.
                module.register_forward_hook(self._abandon, always_call=True),
            )
        for row, site in self._profiled:
            self._handles.append(site.module.register_forward_pre_hook(self._projection_hook(row, site)))

    def remove(self) -> None:
        """Take every hook off the model. The results stay; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is counted, for warm-ups."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    # ------------------------------------------------------------------ one forward

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        if self._running is None or module is self.model:
            self._running = module
            for moments in self._moments.values():
                moments.begin()
            for factor in self._factors.values():
                factor.refresh()
        if module is self._decoder:
            self._real = self._arguments.real_tokens(args, kwargs, self.skip_first)

    def _projection_hook(self, row: int, site: HeadSite) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (
                self._running is not None
            ):  # else not within a forward: a checkpoint's recomputation, a layer called alone
                self._measure(row, site, args[0].detach())

        return pre_hook

    def _measure(self, row: int, site: HeadSite, x: Tensor) -> None:
        if self._real is None:
            raise RuntimeError(
                f"{site.name} ran outside the decoder's own call: its real tokens are not known"
            )
        if x.dim() != 3 or x.shape[-1] != site.num_heads * site.head_dim:
            raise RuntimeError(
                f"{site.name}: expected an input [batch, seq, {site.num_heads * site.head_dim}], got {list(x.shape)}"
            )
        backend = backend_for(self.backend, x, site.head_dim)
        self._backends_used.add(backend)
        with exact_arithmetic(x.device.type):
            values, present = samples(
                x, self._real, self.token_agg, site.num_heads, self._contribution(backend, row, site, x)
            )
            self._moments_on(x.device).pending.update(row, values, present)

    def _contribution(self, backend: str, row: int, site: HeadSite, x: Tensor) -> ContributionNorms:
        if backend == "loop":
            return loop_norms(dense_weight(site), site.num_heads)
        if backend == "einsum":
            return einsum_norms(dense_weight(site), site.num_heads)
        return factored_norms(self._factors[row].lower(x))

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._decoder:
            self._real = None
        if module is self._running:
            self._running = None
            for moments in self._moments.values():
                moments.commit()

    def _abandon(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._running:
            self._running = self._real = None

    def _moments_on(self, device: torch.device) -> CommittedMoments:
        if device not in self._moments:
            self._moments[device] = CommittedMoments(len(METRICS), len(self.sites), self._max_heads, device)
        return self._moments[device]

    # ------------------------------------------------------------------ results

    def to_profile(self) -> HeadProfile:
        """What the forwards that ended normally gave so far, as a HeadProfile. Waits for the device.

        Raises StaleFactorError where a weight was changed in a way that showed only in its bits (`weight.data.mul_()`):
        what was measured since may be wrong, and `reset()` starts afresh.
        """
        stale = [factor.site.name for factor in self._factors.values() if not factor.verify()]
        if stale:
            raise StaleFactorError(
                f"the weight of {', '.join(stale)} was changed in place behind autograd's back while profiling: what was "
                "measured since may be wrong. Call reset() after such a change"
            )
        total: Moments | None = None
        for moments in self._moments.values():  # a layer that moved between devices has samples on both
            here = Moments(*(plane.cpu() for plane in moments.committed.views()))
            total = here if total is None else total.merged(here)
        assert total is not None  # the constructor made one for each weight's device
        self._warn_of_nonfinite(total)
        by_metric = {name: Moments(*(plane[m].clone() for plane in total)) for m, name in enumerate(METRICS)}
        return HeadProfile(by_metric, self._metadata())

    def get_results(self) -> dict[str, Any]:
        """`{metric: {statistic: tensor}, ..., "metadata": {...}}`; every tensor is on the CPU, `[num_layers, num_heads]`, float64
        (int64 for "count" and "nonfinite"); row i is `find_sites(model)[i]`. Raises as `to_profile` does.
        """
        return self.to_profile().results()

    def reset(self) -> None:
        """Forget every sample and take the weights as they are now."""
        for moments in self._moments.values():
            moments.clear()
        for factor in self._factors.values():
            factor.rebuild()
        self._warned = False

    def _metadata(self) -> dict[str, Any]:
        used = sorted(self._backends_used)
        return describe(
            self.model,
            self.sites,
            token_agg=self.token_agg,
            skip_first=self.skip_first,
            backend="+".join(used) if used else self.backend,
            precision=self.precision,
            layers=self.layers,
        )

    def _warn_of_nonfinite(self, moments: Moments) -> None:
        number = int(moments.nonfinite.sum())
        if number and not self._warned:
            self._warned = True
            warnings.warn(
                f"{number} samples were NaN or infinite: they are counted in 'nonfinite' and left out of all else",
                RuntimeWarning,
                stacklevel=4,
            )


def _choose(sites: list[HeadSite], layers: list[int] | None) -> list[tuple[int, HeadSite]]:
    """The rows to profile, with their sites."""
    rows = list(enumerate(sites))
    if layers is None:
        return rows
    known = {site.layer for site in sites}
    if not layers or not known.issuperset(layers):
        raise ValueError(
            f"layers must name some of the layers {min(known)} to {max(known)} that have a site, not {layers}"
        )
    return [(row, site) for row, site in rows if site.layer in layers]
