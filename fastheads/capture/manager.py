"""The HookManager: the public face of the capture."""

import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import nn

from fastheads.capture.attach import attach
from fastheads.capture.collect import collect
from fastheads.capture.recorder import Recorder
from fastheads.capture.scope import scope_of
from fastheads.capture.stats import LaunchStats
from fastheads.capture.verify import Finding, SelfCheck
from fastheads.errors import NotCopyableError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.sites import HeadSite, unwrapped
from fastheads.results.head_profile import HeadProfile, warn_where_empty
from fastheads.stats.options import GROUP_BYTES, MeasureOptions
from fastheads.stats.token_layout import TokenMask


class HookManager:
    """Profiles every attention head of `model` while it runs, without changing the run.

    Attaches in the constructor; `remove()`, or leaving the `with` block, detaches, and so does forgetting the manager. Of a batch
    nothing is held but small inputs that are still to be measured (`group_bytes`).

    Of a tensor-parallel model (`from_pretrained(..., tp_plan="auto")`) each rank measures its own heads. Attaching, forwards,
    `reset()`, `get_results()` and `to_profile()` are then for every rank alike, as the model's own calls are: a rank that leaves
    one out lets the others wait until the process group's timeout. The results are the whole model's, the same on every rank.

    Args:
        model: a transformers model, or any module whose attention modules are called and built as theirs. DataParallel, DDP and
            torch.compile wrappers are looked through.
        token_agg: what one sample is. "last": a sequence's value at its last valid token; "all": the mean of the value over the
            sequence's valid tokens; "token": each valid token.
        layers: profile only the sites of these layers (None: all). Rows of the results are those of `find_sites(model)` all the
            same; the others have count 0.
        backend: "auto", "loop", "einsum", "factored", "triton", or a name given to `fastheads.register_backend`.
        precision: "exact" or "fast"; only "triton" has a faster way to be less exact.
        skip_first: leave out the first valid tokens of each sequence (1 leaves the attention sink out).
        group_bytes: inputs of up to so many bytes a device, and as many of residual streams, are kept until one launch at the end
            of the decoder's call serves them all; larger ones are measured at once. Where the kernel serves them, forwards of a
            quarter of that or less wait until up to 32 have ended. 0 measures every input at once, for models that reuse their
            memory.
        allow_skipped: accept that a site does not run in every forward (layer dropout, early exit); else `get_results` raises.
        kv_groups: measure `kv_group_residual_contribution_norm` too: the norm of what the query heads that share keys and values
            contribute together. In the results a "head" of that metric is a KV head.
        include: names of attention modules, as patterns, that are profiled though they are left out by default (`find_sites`).
        verify: check each site in the first batch, against what its projection really gives and what its attention made
            (`fastheads.capture.verify`). A forward that does not pass raises VerificationError and counts nothing. Not for
            tensor-parallel models.
        metrics: names of the metrics that the results hold, `register_metric`'s among them (None: the library's own, but
            `head_residual_contribution_power`, which is optional, and that of `kv_groups`).
        vectors: measure each head's mean output z̄ and E‖W_h z_h‖² too, over the same tokens (`HeadProfile.vectors`), for mean
            ablation and projections. They are of one weight: where it changes, results are refused until `reset()`.
        streaming: (sink, window): measure also what the residual stream loses, at each token, if a head sees only the first
            `sink` tokens of the sequence and the last `window`: `head_streaming_error`, the same for the heads of a KV group
            together, `kv_group_streaming_error`, and the squares of both. Samples are of the valid tokens beyond sink + window.
            The attention is computed once more, in eager code alone, and inputs are measured at once. Layers whose attention
            cannot be seen, or is windowed already, have no samples; the metadata say why (`streaming_unknown`).

    Raises:
        NoSitesError: the model has nothing to profile.
        UnsupportedWeightError: a projection's dense weight cannot be had with certainty.
        ValueError, RuntimeError: an option is unknown, or the backend asked for cannot work here, or the ranks of a
            tensor-parallel model have different options.
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
        group_bytes: int = GROUP_BYTES,
        allow_skipped: bool = False,
        kv_groups: bool = False,
        include: str | Iterable[str] = (),
        verify: bool = False,
        metrics: Iterable[str] | None = None,
        vectors: bool = False,
        streaming: tuple[int, int] | None = None,
    ) -> None:
        self._model = unwrapped(model)
        self._options = MeasureOptions.of(
            token_agg=token_agg,
            layers=layers,
            backend=backend,
            precision=precision,
            skip_first=skip_first,
            group_bytes=group_bytes,
            allow_skipped=allow_skipped,
            kv_groups=kv_groups,
            include=include,
            verify=verify,
            metrics=metrics,
            vectors=vectors,
            streaming=streaming,
        )
        scope = scope_of(self._model, self._options)
        self._recorder = Recorder(scope)
        self._handles: list[Any] = []
        self._warned = False
        try:
            self._weights = self._fingerprint()
            if verify:
                self._recorder.check = SelfCheck(self._model, list(scope.chosen.values()))
            if scope.ranks is not None:
                scope.ranks.check_agreement(scope.sites, **self._options.agreed())
            self._recorder.attached = True
            attach(self._recorder, self._handles)
        except BaseException:
            self.remove()
            raise

    def __repr__(self) -> str:
        scope, options = self._recorder.scope, self._options
        state = "attached" if self._handles else "removed"
        return (
            f"<HookManager of {type(self._model).__name__}: {len(scope.chosen)} of {len(scope.sites)} sites, "
            f"token_agg={options.token_agg!r}, backend={scope.accumulator.backend!r}, {state}>"
        )

    @property
    def model(self) -> nn.Module:
        """The module that is profiled, without wrappers."""
        return self._model

    @property
    def token_agg(self) -> str:
        """The tokens that make a sample: "last", "all" or "token"."""
        return self._options.token_agg

    @property
    def sites(self) -> list[HeadSite]:
        """`find_sites(model)`: the rows of the results."""
        return self._recorder.scope.sites

    @property
    def findings(self) -> dict[str, Finding]:
        """The findings of `verify=True` by the names of the sites; filled while the first batch runs."""
        check = self._recorder.check
        return {} if check is None else check.findings

    @property
    def stats(self) -> LaunchStats:
        """The counts of launches and deferred forwards since the hooks were attached or reset, and the memory of inputs held now
        (`fastheads.capture.stats`). Never waits for a device, nor for another thread's forward.
        """
        return self._recorder.stats()

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which nothing that this thread runs is counted, for warm-ups."""
        return self._recorder.paused()

    def token_mask(self, mask: TokenMask) -> AbstractContextManager[None]:
        """Return a context in which `mask` sets the valid tokens, in place of the call's own, for the thread that enters it.

        Sequences stay those of the call, and `skip_first` still leaves out the first valid tokens of each. Under torch.compile
        the mask is an input of the graph.

        Args:
            mask: bool `[batch, seq]`, True where a token is real: the tokens of the decoder's own call. Or a function, for calls
                that differ (a prompt and the steps after it): it is given the arguments of the decoder's call by name, and
                returns such a mask, or None to use the masks in the arguments.

        Raises:
            TokensError: `mask` is neither; or, raised by the forward, it is not bool or does not fit the call's tokens.
        """
        return self._recorder.scope.engine.overridden(mask)

    def to_profile(self) -> HeadProfile:
        """Return the profile of the forwards that have ended normally. Waits for the device.

        With tensor parallelism call it on every rank: it waits for the others, and returns the whole model's profile on each.

        Raises:
            StaleFactorError: a weight was changed in a way that only its bits show (`weight.data.mul_()`), or the multiplier of
                a layer's attention output was: samples since then may be wrong. `reset()` starts over.
            ResultsError: a site did not run in every forward or could not be verified, or forwards could not be measured.
            RuntimeError: with tensor parallelism, on every rank: an error ended a forward on some ranks only, or another rank
                could not give its results.
        """
        return self._collected(stacklevel=3)

    def _collected(self, stacklevel: int) -> HeadProfile:
        with self._recorder.lock:
            profile, nonfinite = collect(self._recorder, self._weights)
        if nonfinite and not self._warned:
            self._warned = True
            warnings.warn(
                f"{nonfinite} samples were NaN or infinite: they are counted in 'nonfinite' and left out of all else",
                RuntimeWarning,
                stacklevel=stacklevel,
            )
        return profile

    def get_results(self) -> dict[str, Any]:
        """Return `{metric: {statistic: tensor}, ..., "metadata": {...}}`. Every tensor is on the CPU, `[num_layers, num_heads]`,
        float64 (int64 for "count" and "nonfinite"); row i is `find_sites(model)[i]`. Raises as `to_profile` does, and warns if
        nothing was measured.
        """
        found = self._collected(stacklevel=3)
        warn_where_empty(found)
        return found.results()

    def reset(self) -> None:
        """Forget all samples, also of forwards under way, read the current weights, and set the counts of `stats` to zero."""
        with self._recorder.lock:
            self._recorder.reset()
            self._weights = self._fingerprint()
            self._warned = False

    def remove(self) -> None:
        """Take every hook off the model. The results stay as they are, also if a CUDA graph that was captured with the hooks is
        replayed; calling it again does nothing.
        """
        self._detach(is_forgotten=False)

    def _detach(self, *, is_forgotten: bool) -> None:
        recorder = self._recorder
        with recorder.lock:
            if recorder.check is not None:
                recorder.check.close()
            if not self._handles:
                return
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            recorder.attached = (
                False  # not before: forwards after Ctrl-C in the loop must show that sites are missing
            )
            recorder.close(is_forgotten=is_forgotten)

    def __del__(self) -> None:
        # Nobody can ask for its results any more: the model must not go on paying for them, nor be kept.
        if sys.is_finalizing() or not getattr(self, "_handles", None):
            return
        self._detach(is_forgotten=True)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyableError(
            "a HookManager cannot be copied or pickled, since its hooks are on one model: keep to_profile(), or get_results()"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _fingerprint(self) -> dict[str, Any] | None:
        """Return the fingerprint of the current weights; None if each rank has only its own."""
        return fingerprint(self._model) if self._recorder.scope.ranks is None else None


def recorder_of(hooks: HookManager) -> Recorder:
    """Return the manager's recorder, for other rooms of the package; it is not public."""
    return hooks._recorder


def weights_of(hooks: HookManager) -> dict[str, Any] | None:
    """Return the fingerprint of the weights, taken when the hooks were attached, or at the last `reset`."""
    return hooks._weights
