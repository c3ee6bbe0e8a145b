"""The basic HookManager: a hook on each o_proj, a Python loop over heads, scalar Welford.

It is the plain statement of what is measured, in float64 and without a trick, and the oracle of the tests. Use
`fastheads.HookManager`, which gives the same results from the same calls, for anything larger than a test.
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
from fastheads.errors import OptionError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe
from fastheads.models.sites import HeadSite, decoder_of, find_sites, unwrapped
from fastheads.models.weights import dense_weight
from fastheads.results.head_profile import HeadProfile, warn_where_empty
from fastheads.stats.metrics import METRICS, TOKEN_AGGS, UPDATE_METRIC
from fastheads.stats.moments import Moments
from fastheads.stats.token_layout import DecoderArguments, TokenLayout, TokenMask


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
    """Profiles every attention head of `model` while it runs, one head at a time.

    token_agg: "last" (a sample is a sequence's value at its last valid token), "all" (its mean over the valid tokens) or "token"
    (each valid token is a sample). Raises NoSitesError where the model has no o_proj to profile.
    """

    def __init__(self, model: nn.Module, token_agg: str = "last") -> None:
        if token_agg not in TOKEN_AGGS:
            raise OptionError(f"unknown token_agg {token_agg!r}: choose one of {', '.join(TOKEN_AGGS)}")
        self.model = unwrapped(model)
        self.token_agg = token_agg
        self.sites = find_sites(self.model)
        self._updates = Updates(self.model, dict(enumerate(self.sites)))
        self._decoder = decoder_of(self.model)
        self._arguments = DecoderArguments(self._decoder)
        self._real: TokenLayout | None = None  # the valid tokens of the running call of the decoder
        self._paused = False
        self._handles: list[Any] = []
        self.reset()
        self._attach_hooks()

    def reset(self) -> None:
        """Forget every sample."""
        names = (*METRICS, UPDATE_METRIC)
        self._weights = fingerprint(self.model)
        self._stats = [[[Welford() for _ in range(site.num_heads)] for _ in names] for site in self.sites]

    def _attach_hooks(self) -> None:
        self._handles.append(self._decoder.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(self._decoder.register_forward_hook(self._leave, always_call=True))
        for row, site in enumerate(self.sites):
            self._handles.append(
                site.module.register_forward_hook(self._make_o_proj_hook(row, site), prepend=True)
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._real = None if self._paused else self._arguments.token_layout(args, kwargs, skip_first=0)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._real = None

    def _make_o_proj_hook(self, row: int, site: HeadSite) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._real is None:
                return
            x = args[0].double()  # o_proj's input: [batch, seq, num_heads * head_dim]
            batch, seq, _ = x.shape
            head_outputs = x.reshape(batch * seq, site.num_heads, site.head_dim)
            mask = self._real.mask(x)
            # As the layer will run: by this bitsandbytes repacks its weight, or not.
            with torch.set_grad_enabled(args[0].requires_grad):
                weight = dense_weight(site).double()  # [hidden, num_heads * head_dim]
            reaching, scale = self._reaching(row, weight, output.double())
            scale = scale.reshape(batch * seq)
            cu_seqlens = self._real.cu_seqlens
            if cu_seqlens is None:  # each row is a sequence
                cu_seqlens = torch.arange(batch + 1) * seq
            for start, stop in pairwise(cu_seqlens.tolist()):
                real, of_tokens = (
                    head_outputs[start:stop],
                    scale[start:stop],
                )  # [tokens, heads, head_dim], [tokens]
                if mask is not None:
                    here = mask.flatten()[start:stop]
                    real, of_tokens = real[here], of_tokens[here]
                if self.token_agg == "last":
                    real, of_tokens = real[-1:], of_tokens[-1:]
                if len(real):
                    self._update(row, site, real, weight=weight, reaching=reaching, scale=of_tokens)

        return hook

    def _reaching(self, row: int, weight: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer adds of a head with the output z is scale * (reaching @ z): a weight, and a number of each token."""
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
        reaching: Tensor,
        scale: Tensor,
    ) -> None:
        """Take the samples of one sequence: `head_outputs` `[tokens, num_heads, head_dim]`, `scale` `[tokens]`."""
        per_head = []
        for h in range(site.num_heads):
            head_out = head_outputs[:, h]  # [tokens, head_dim]
            columns = slice(h * site.head_dim, (h + 1) * site.head_dim)
            contrib = head_out @ weight[:, columns].T  # [tokens, hidden]
            added = scale[:, None] * (head_out @ reaching[:, columns].T)
            of_tokens = torch.stack([v.norm(dim=1) for v in (head_out, contrib, added)])  # [3, tokens]
            per_head.append(of_tokens.mean(dim=1, keepdim=True) if self.token_agg == "all" else of_tokens)
        norms = torch.stack(per_head, dim=-1)  # [3, samples, num_heads]
        samples, updates = norms[:2], norms[2]
        layer_mean = samples.mean(dim=-1, keepdim=True)
        relative = torch.where(layer_mean.isfinite(), samples / layer_mean, torch.nan)
        known = [updates] if row in self._updates.known else []
        for metric, values in enumerate([*samples, *relative, *known]):
            for sample in values.tolist():
                for h, value in enumerate(sample):
                    self._stats[row][metric][h].update(value)

    def to_profile(self) -> HeadProfile:
        """What was measured so far, as a HeadProfile."""
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
            for m, name in enumerate((*METRICS, UPDATE_METRIC))
        }
        options = {"token_agg": self.token_agg, "skip_first": 0, "backend": "basic", "precision": "exact"}
        told = self._updates.describe(range(len(self.sites)))
        about = describe(
            self.model, self.sites, **options, layers=None, residual_update=told, weights=self._weights
        )
        return HeadProfile(moments, about)

    def get_results(self) -> dict[str, Any]:
        """`{metric: {statistic: tensor [num_layers, num_heads]}, ..., "metadata": {...}}`, as the fast manager gives it."""
        found = self.to_profile()
        warn_where_empty(found)
        return found.results()

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is counted."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def token_mask(self, mask: TokenMask) -> AbstractContextManager[None]:
        """A context in which `mask`, bool `[batch, seq]`, says which tokens of a call are real, as in the fast manager."""
        return self._arguments.overridden(mask)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
