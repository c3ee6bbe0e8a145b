"""The basic HookManager: a hook on each o_proj, a Python loop over heads, scalar Welford.

It is the readable reference of what is measured, in float64. `fastheads.HookManager` gives the same results from the same calls,
fast.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastheads.capture.channels import Updates
from fastheads.capture.residual_stream import ResidualStreams
from fastheads.capture.stats import LaunchStats
from fastheads.capture.verify import Finding
from fastheads.errors import OptionError
from fastheads.models.families import rows_of_ids
from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe, kv_heads_of
from fastheads.models.sites import HeadSite, decoder_of, find_sites, unwrapped
from fastheads.models.stream import StreamSource
from fastheads.models.weights import dense_weight
from fastheads.results.head_profile import HeadProfile, warn_where_empty
from fastheads.stats.metrics import METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC, TOKEN_AGGS, UPDATE_METRIC
from fastheads.stats.moments import Moments
from fastheads.stats.token_layout import DecoderArguments, TokenLayout, TokenMask

NAMES = (*METRICS, UPDATE_METRIC, RATIO_METRIC, RATIO_SQUARE_METRIC)


class Welford:
    """Running mean and sum of squared deviations of one stream of numbers (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.nonfinite = 0, 0
        self.mean, self.m2 = 0.0, 0.0
        self.min, self.max = math.inf, -math.inf

    def update(self, value: float) -> None:
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.m2 += delta * (value - self.mean)
        self.min, self.max = min(self.min, value), max(self.max, value)


class HookManager:
    """Profile every attention head of `model` while it runs, one head at a time.

    token_agg: a sample is, for "last", the value at a sequence's last valid token; for "all", the mean over its valid tokens; for
    "token", the value at a valid token. Raises NoSitesError if the model has no o_proj to profile.
    """

    def __init__(self, model: nn.Module, token_agg: str = "last") -> None:
        if token_agg not in TOKEN_AGGS:
            raise OptionError(f"unknown token_agg {token_agg!r}: choose one of {', '.join(TOKEN_AGGS)}")
        self.model = unwrapped(model)
        self.token_agg = token_agg
        self.sites = find_sites(self.model)
        self._kv_heads = kv_heads_of(self.model, self.sites)
        self._updates = Updates(self.model, dict(enumerate(self.sites)))
        self._residuals = ResidualStreams(self.model, dict(enumerate(self.sites)), self._updates)
        self._residual_norms: dict[int, Tensor] = {}  # ‖r‖ of each token [batch, seq], by row
        self._decoder = decoder_of(self.model)
        self._arguments = DecoderArguments(self._decoder, rows_of_ids(self._decoder))
        self._layout: TokenLayout | None = None  # the valid tokens of the decoder's running call
        self._paused = False
        self._handles: list[Any] = []
        self.reset()
        self._attach_hooks()

    def reset(self) -> None:
        """Forget every sample."""
        names = NAMES
        self._weights = fingerprint(self.model)
        self._launches = 0
        self._stats = [[[Welford() for _ in range(site.num_heads)] for _ in names] for site in self.sites]

    def _attach_hooks(self) -> None:
        self._handles.append(self._decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(self._decoder.register_forward_hook(self._leave, always_call=True))
        for row, source in self._residuals.sources.items():
            hook = self._make_residual_hook(row, source)
            self._handles.append(source.module.register_forward_pre_hook(hook, with_kwargs=True))
        for row, site in enumerate(self.sites):
            self._handles.append(
                site.module.register_forward_hook(self._make_o_proj_hook(row, site), prepend=True)
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._layout = None if self._paused else self._arguments.token_layout(args, kwargs, skip_first=0)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._layout = None

    def _make_residual_hook(self, row: int, source: StreamSource) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._layout is not None:
                self._residual_norms[row] = source.read(args, kwargs).detach().double().norm(dim=-1)

        return hook

    def _make_o_proj_hook(self, row: int, site: HeadSite) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._layout is None:
                return
            self._launches += 1
            x = args[0].double()  # o_proj's input: [batch, seq, num_heads * head_dim]
            batch, seq, _ = x.shape
            head_outputs = x.reshape(batch * seq, site.num_heads, site.head_dim)
            mask = self._layout.mask(x)
            # In the layer's gradient mode, by which bitsandbytes decides to repack its weight.
            with torch.set_grad_enabled(args[0].requires_grad):
                weight = dense_weight(site).double()  # [hidden, num_heads * head_dim]
            update_weight, scale = self._update_weight(row, weight, output.double())
            scale = scale.reshape(batch * seq)
            residual_norm = (
                self._residual_norms.pop(row, scale.new_tensor(torch.nan)).expand(batch, seq).reshape(-1)
            )
            cu_seqlens = self._layout.cu_seqlens
            if cu_seqlens is None:  # each row is a sequence
                cu_seqlens = torch.arange(batch + 1) * seq
            for start, stop in pairwise(cu_seqlens.tolist()):
                valid = head_outputs[start:stop]  # [tokens, heads, head_dim]
                scales = torch.stack([scale, scale / residual_norm])[:, start:stop]  # [2, tokens]
                if mask is not None:
                    keep = mask.flatten()[start:stop]
                    valid, scales = valid[keep], scales[:, keep]
                if self.token_agg == "last":
                    valid, scales = valid[-1:], scales[:, -1:]
                if len(valid):
                    self._update(row, site, valid, weight=weight, update_weight=update_weight, scales=scales)

        return hook

    def _update_weight(self, row: int, weight: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight and a number for each token: the layer adds scale * (update_weight @ z) for a head's output z."""
        update, ones = self._updates.known.get(row), torch.ones_like(output[..., 0])
        if update is None:
            return weight, ones * torch.nan
        if update.norm is None:
            return weight, ones * update.multiplier
        gain = update.gain(len(weight), weight.device)
        root = (output.square().mean(dim=-1) + update.eps).sqrt()
        root = root.masked_fill(root.isinf(), torch.nan)
        return gain[:, None] * weight, update.multiplier / root

    def _update(
        self,
        row: int,
        site: HeadSite,
        head_outputs: Tensor,
        *,
        weight: Tensor,
        update_weight: Tensor,
        scales: Tensor,
    ) -> None:
        """Add the samples of one sequence: `head_outputs` `[tokens, num_heads, head_dim]`; `scales` `[2, tokens]` of the update,
        as it is and over the norm of the residual stream.
        """
        per_head = []
        for h in range(site.num_heads):
            head_out = head_outputs[:, h]  # [tokens, head_dim]
            columns = slice(h * site.head_dim, (h + 1) * site.head_dim)
            contrib = head_out @ weight[:, columns].T  # [tokens, hidden]
            added, ratio = scales[:, :, None] * (head_out @ update_weight[:, columns].T)
            norms = [v.norm(dim=1) for v in (head_out, contrib, added, ratio)]
            of_tokens = torch.stack([*norms, norms[-1].square()])  # [5, tokens]
            per_head.append(of_tokens.mean(dim=1, keepdim=True) if self.token_agg == "all" else of_tokens)
        values = torch.stack(per_head, dim=-1)  # [5, samples, num_heads]
        samples = values[:2]
        layer_mean = samples.mean(dim=-1, keepdim=True)
        relative = torch.where(layer_mean.isfinite(), samples / layer_mean, torch.nan)
        known = 5 if row in self._residuals.sources else 3 if row in self._updates.known else 2
        for metric, of_metric in enumerate([*samples, *relative, *values[2:known]]):
            for sample in of_metric.tolist():
                for h, value in enumerate(sample):
                    self._stats[row][metric][h].update(value)

    def to_profile(self) -> HeadProfile:
        """Return the results so far as a HeadProfile."""
        heads = max(site.num_heads for site in self.sites)
        empty = Welford()

        def plane(metric: int, name: str, dtype: torch.dtype) -> Tensor:
            rows = [
                [getattr(s, name) for s in row[metric]] + [getattr(empty, name)] * (heads - len(row[metric]))
                for row in self._stats
            ]
            return torch.tensor(rows, dtype=dtype, device="cpu")

        moments = {
            name: Moments(
                *(
                    plane(m, f, torch.int64 if f in ("count", "nonfinite") else torch.float64)
                    for f in Moments._fields
                )
            )
            for m, name in enumerate(NAMES)
        }
        options = {"token_agg": self.token_agg, "skip_first": 0, "backend": "basic", "precision": "exact"}
        updates = self._updates.describe(range(len(self.sites)))
        about = describe(
            self.model,
            self.sites,
            self._kv_heads,
            **options,
            layers=None,
            residual_update=updates,
            residual_stream=self._residuals.describe(range(len(self.sites))),
            weights=self._weights,
        )
        return HeadProfile(moments, about)

    def get_results(self) -> dict[str, Any]:
        """Return `{metric: {statistic: tensor [num_layers, num_heads]}, ..., "metadata": {...}}`, as the fast manager does."""
        found = self.to_profile()
        warn_where_empty(found)
        return found.results()

    def remove(self) -> None:
        """Remove every hook from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def findings(self) -> dict[str, Finding]:
        """Nothing: this manager checks nothing (`verify=True` of the fast one)."""
        return {}

    @property
    def stats(self) -> LaunchStats:
        """How often a projection's input was measured, each by itself and at once."""
        return LaunchStats(launches=self._launches, repeated=0, deferred=0, waiting=0, kept_bytes=0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this context, count nothing."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def token_mask(self, mask: TokenMask) -> AbstractContextManager[None]:
        """In this context, `mask`, bool `[batch, seq]`, sets the valid tokens of a call, as in the fast manager."""
        return self._arguments.overridden(mask)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
