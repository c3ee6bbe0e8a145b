"""The factor of a projection's weight, and the proof that it is not stale.

With W_h `[hidden, head_dim]` one head's slice of W and G_h = W_hᵀW_h = L_h L_hᵀ, ‖W_h z‖ = ‖z L_h‖ exactly. G is built in
float64: it squares W's condition number, and in float32 the weak directions of a head would be lost.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastheads.backends.protocol import FusedBackend, NormsBackend
from fastheads.models.residual import Place, Update
from fastheads.models.sites import HeadSite
from fastheads.models.weights import (
    checksum,
    dense_weight,
    hold,
    hold_key,
    is_plain,
    key_reader,
    moves_when_run,
)

# float64 elements of W to widen at a time: 256 MiB, so that a 405B layer does not need 2 GB at once.
CHUNK_ELEMENTS = 2**25


@contextmanager
def _plain_mode() -> Iterator[None]:
    """No gradients and no inference tensors, which could not be changed in place later."""
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
        yield


class WeightReading:
    """The dense weight of one projection with its version and checksum: read once, for all that is made of it."""

    def __init__(self, site: HeadSite, weight: Tensor | None = None) -> None:
        """`weight` is `dense_weight(site)`, where the caller has it."""
        # In the caller's mode, like every look at the weight: what acts may depend on it (`repacks_when_run`).
        self.weight = dense_weight(site) if weight is None else weight
        self.version = WeightVersion(site)

    @cached_property
    def checksum(self) -> Tensor:
        """That of the weight's bits, an int64 scalar."""
        with _plain_mode():
            return checksum(self.weight)


class WeightVersion:
    """The version key of one projection's weight at this moment, and how to read it again."""

    def __init__(self, site: HeadSite) -> None:
        self.moves_itself = moves_when_run(site)
        self.read_key = key_reader(site)
        self.key, self.held = self.read_key(), hold_key(site)


class SiteWeight:
    """The weight of one projection, of which is known when it is replaced, moved or changed in place the ordinary way."""

    _key: Any

    def __init__(
        self, site: HeadSite, update: Update | None = None, version: WeightVersion | None = None
    ) -> None:
        """With an `update` it is diag(g) W, g the gain of its norm. `version` is that of the weight, where the caller has it."""
        self.site = site
        self._update = update
        self._note_version(version or WeightVersion(site))

    def places(self) -> list[Place] | None:
        """The slots of all parameters and norms that the weight is made from; None if it depends on anything else."""
        if not is_plain(self.site):
            return None
        norm = [] if self._update is None else self._update.places()
        return None if norm is None else [(self.site.module._parameters, "weight"), *norm]

    def mark_changed(self) -> None:
        """The weight may have changed without a trace: `refresh` takes it anew."""
        self._key = ()

    def key(self) -> Any:
        """A key that changes when the weight is replaced, or changed in place through autograd."""
        key = self._read_key()
        return key if self._update is None else (key, self._update.key())

    def moved(self) -> bool:
        """True if the weight is known to have changed since the last `refresh`."""
        return bool(self.key() != self._key)

    def refresh(self) -> None:
        """Take the weight as it is. Raises UnsupportedWeightError where it cannot be read any more."""
        if self.moved():
            dense_weight(self.site)
            self._note_version(WeightVersion(self.site))

    def _note_version(self, version: WeightVersion) -> None:
        self.moves_itself, self._read_key = version.moves_itself, version.read_key
        self._key = version.key
        self._held = version.held
        if self._update is not None:
            self._key = (version.key, self._update.key())
            self._held = version.held + hold(self._update.parameters())


class SiteFactor(SiteWeight):
    """The factor of one projection in the forms that backends read, kept as long as the weight it was made from stands.

    A weight that is replaced, moved or changed in place the ordinary way is seen by `refresh` before the next forward; one that
    is changed behind autograd's back (`weight.data.mul_()`, a write through numpy) is seen by `verify` afterwards. Forms are
    rewritten in place, for a CUDA graph holds their addresses.
    """

    def __init__(
        self, site: HeadSite, reading: WeightReading | None = None, update: Update | None = None
    ) -> None:
        """`reading` is that of the weight, where the caller has it: it can take long to read."""
        self.in_graph = False  # a CUDA graph reads it
        self.in_own_graph = (
            False  # one that was captured by hand: its replays ask nobody whether the weight has changed
        )
        self._dense: Tensor | None = None  # [heads, D, D], for the torch path
        # By backend, dtype of the input, and precision.
        self._fused: dict[tuple[str, torch.dtype, str], Any] = {}
        self._unverified = False
        self._stale = False
        self.site, self._update = (
            site,
            update,
        )  # not as the base does it: the weight may be slow to look at twice
        self._note_weight(reading or WeightReading(site))

    def make(self, weight: Tensor, backend: NormsBackend | FusedBackend, precision: str) -> None:
        """Make the form that the backend will ask for, of the weight as it was just read."""
        lower = self._lower(weight)
        if backend.needs == "form":
            self._make_form(backend, lower, weight.dtype, precision)
        else:
            self._write_dense(lower)

    def dense(self) -> Tensor:
        """L `[num_heads, head_dim, head_dim]`, lower triangular: float32, or float64 for a float64 weight."""
        self._unverified = True
        if self._dense is None:
            self._write_dense(self._lower())
        assert self._dense is not None
        return self._dense

    def form(self, backend: FusedBackend, dtype: torch.dtype, precision: str) -> Any:
        """The form that a fused backend reads (`fastheads.kernels.KernelFactor`)."""
        self._unverified = True
        form = self._fused.get((backend.name, dtype, precision))
        return self._make_form(backend, self._lower(), dtype, precision) if form is None else form

    def _make_form(self, backend: FusedBackend, lower: Tensor, dtype: torch.dtype, precision: str) -> Any:
        form = backend.prepare(lower, dtype, precision)
        self._fused[backend.name, dtype, precision] = form
        return form

    def keep_dense_in(self, storage: Tensor) -> None:
        """Hold the dense form in `storage` `[num_heads, head_dim, head_dim]`, so that neighbours make one batch."""
        lower = self._lower() if self._dense is None else self._dense
        self._dense = storage
        self._write_dense(lower)

    def refresh(self) -> None:
        """Rebuild where the weight is known to have changed; reads no value back."""
        if self.moved():
            self.rebuild()
            self._stale = self.in_own_graph  # a replay may have come between the change and this forward

    def rebuild(self) -> None:
        """Make every form anew of the weight as it is now; forgets that it was stale."""
        self._stale = False
        reading = WeightReading(self.site)
        self._note_weight(reading)
        if self._dense is None and not self._fused:
            return
        lower = self._lower(reading.weight)
        if self._dense is not None:
            self._write_dense(lower)
        for key, form in list(self._fused.items()):
            if form.buffer.device == lower.device:
                form.refresh(lower)
            else:
                del self._fused[key]  # made on the new device when it is asked for

    def verify(self) -> bool:
        """Whether the bits of the weight are those that the factor was made from. Waits for the device.

        Where the weight has since been changed the ordinary way there is nothing left to compare with: a change behind autograd's
        back before that one is not seen. Nor is one that was undone.
        """
        if self._stale or not (self._unverified or self.in_graph):
            return not self._stale
        if self.moved():
            return not self.in_graph
        self._unverified = not torch.equal(self._sum(checksum(dense_weight(self.site))), self._checksum)
        return not self._unverified

    def _note_weight(self, reading: WeightReading) -> None:
        """Keep the version and the checksum of the weight as it was read."""
        self._note_version(reading.version)
        weight = reading.weight
        # Of the dense form: float32 rounds by 6e-8, as the products themselves do.
        self.place = (weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)
        with _plain_mode():
            self._checksum = self._sum(reading.checksum)
        self._unverified = False

    def _sum(self, total: Tensor) -> Tensor:
        """A checksum over the bits of all that the factor is made from; `total` is the weight's."""
        for parameter in () if self._update is None else self._update.parameters():
            total = total * 31 + checksum(parameter.detach().view(1, -1)).to(total.device)
        return total

    def _lower(self, weight: Tensor | None = None) -> Tensor:
        weight = dense_weight(self.site) if weight is None else weight
        with _plain_mode():
            gain = None if self._update is None else self._update.gain(weight.shape[0], weight.device)
            return lower_factor(weight, self.site.num_heads, gain)

    def _write_dense(self, lower: Tensor) -> None:
        with _plain_mode():
            lower = lower.to(*self.place)
            if self._dense is None or (self._dense.device, self._dense.dtype) != (lower.device, lower.dtype):
                self._dense = lower
            else:
                self._dense.copy_(lower)


class WeightWatch:
    """Whether any of many weights has moved, for the price of a short look at each: it is asked twice a forward."""

    def __init__(self, factors: Iterable[SiteWeight]) -> None:
        self._factors = list(factors)
        self._parameters: list[Place] = []
        self._modules: list[Place] = []
        self._others: list[SiteWeight] = []
        self._seen: list[Any] | None = None

    def moved(self) -> bool:
        """Whether a weight, or what acts with it, is another one than at the last `refresh`; as `SiteFactor.moved` of each."""
        return self._seen is None or self._seen != self._look()

    def refresh(self) -> None:
        """`SiteFactor.refresh` of each."""
        for factor in self._factors:
            factor.refresh()
        self._parameters, self._modules, self._others = [], [], []
        for factor in self._factors:
            places = factor.places()
            if places is None:
                self._others.append(factor)
                continue
            for owned, name in places:
                kind = self._parameters if isinstance(owned[name], Tensor) else self._modules
                kind.append((owned, name))
        self._seen = self._look()

    def mark_changed(self) -> None:
        """The weights may have changed without a trace."""
        self._seen = None
        for factor in self._factors:
            factor.mark_changed()

    def _look(self) -> list[Any]:
        try:
            weights = [owned[name] for owned, name in self._parameters]
            # Written out: a call for each would take twice as long.
            seen: list[Any] = [
                (w.untyped_storage()._cdata, w.data_ptr(), w._version, w.dtype) for w in weights
            ]
        except (KeyError, AttributeError, RuntimeError):
            # A weight was taken away, or is an inference tensor, which has no version.
            return [factor.key() for factor in self._factors]
        seen += [owned.get(name) for owned, name in self._modules]
        return seen + [factor.key() for factor in self._others] if self._others else seen


def lower_factor(weight: Tensor, num_heads: int, gain: Tensor | None = None) -> Tensor:
    """L with W_hᵀW_h = L_h L_hᵀ for `weight` `[O, H·D]`: float64 `[H, D, D]`, lower triangular.

    `gain` `[O]` multiplies the rows of W.
    """
    out_features, width = weight.shape
    head_dim = width // num_heads
    if weight.device.type == "mps":
        weight = weight.cpu()
    step = max(1, CHUNK_ELEMENTS // (out_features * head_dim))
    chunks = []
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, num_heads, step):
            w = weight[:, start * head_dim : (start + step) * head_dim].double()
            w = w if gain is None else w * gain.to(w).unsqueeze(1)
            w = w.view(out_features, -1, head_dim).transpose(0, 1)  # [h, O, D]
            chunks.append(_factor_of_gram(w.mT @ w))
    return torch.cat(chunks)


def _factor_of_gram(gram: Tensor) -> Tensor:
    """Cholesky where it exists. A pruned or rank-deficient head has none: eigenvalues, the negative ones clamped, then a QR
    to have the factor triangular again. No jitter: it would be a bias.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    lower[~finite] = torch.nan  # as W z would be; eigh would raise
    failed = ((info != 0) & finite).nonzero().flatten()
    if failed.numel():
        values, vectors = torch.linalg.eigh(gram[failed])
        root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)  # root @ root.mT = gram
        lower[failed] = torch.linalg.qr(root.mT, mode="r").R.mT
    return lower.tril()
