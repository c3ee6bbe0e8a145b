"""From a group of inputs, by the backend that serves them, to updated moments."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fastheads.backends.factors import SiteFactor, SiteWeight, WeightReading, WeightWatch
from fastheads.backends.protocol import FusedBackend, Launch, NormsBackend
from fastheads.backends.registry import backend_for, check_backend
from fastheads.backends.tensor_parallel import Ranks
from fastheads.errors import StaleFactorError
from fastheads.models.residual import Update
from fastheads.models.sites import HeadSite
from fastheads.models.weights import dense_weight
from fastheads.stats.mean_vectors import RunningMeanVectors
from fastheads.stats.metrics import ContributionNorms, TokenReader, packed_samples, samples, with_ratio
from fastheads.stats.moments import RunningMoments
from fastheads.stats.numerics import exact_arithmetic
from fastheads.stats.token_layout import TokenLayout, last_tokens

# Samples of a layer, at most, that wait for the other layers': 32 KiB.
LATE_ELEMENTS = 2**12
# Launches that are kept to be made again: one for each group of layers, shape and presence of a mask or scale.
MOST_LAUNCHES = 256
ALL_METRICS = slice(None)


@dataclass(frozen=True, eq=False)
class _Samples:
    """Samples `[n, 4 or 6, rows, heads]` of one call of the decoder, on their way to the moments."""

    moments: RunningMoments
    rows: list[int]
    values: Tensor
    present: Tensor | None  # bool [n]; the same for all layers of a call

    def joins(self, others: "list[_Samples]") -> bool:
        """Whether one merge can take these along: one shape but for the rows, which are all different."""
        n, metrics, _, heads = self.values.shape
        first = others[0].values.shape
        return (
            (first[0], first[1], first[3]) == (n, metrics, heads)
            and (others[0].present is None) == (self.present is None)
            and not any(row in other.rows for other in others for row in self.rows)
        )


class Accumulator:
    """Takes groups of inputs to a backend and their samples into moments."""

    def __init__(
        self,
        sites: dict[int, HeadSite],
        backend: str,
        precision: str,
        token_agg: str,
        *,
        updates: dict[int, Update] | None = None,
        ranks: Ranks | None = None,
        metrics: slice = ALL_METRICS,
    ) -> None:
        """`sites` by row: with tensor parallelism, as this rank serves them, and the `ranks` that serve the others. With
        `updates`, by row, the weight of a site is diag(g) W, g the gain of its norm. Only samples of `metrics` are kept, in the
        order of METRICS; not for fused backends. It can be used after `read_weights`.

        Raises as `check_backend` and `backend_for` do, for the weights as they are.
        """
        check_backend(backend)
        if ranks is not None:
            backend = ranks.torch_backend(backend)
        self._updates = updates or {}
        self.backend, self.precision, self.token_agg = backend, precision, token_agg
        self.used: set[str] = set()
        self.factors: dict[int, SiteFactor] = {}
        self._sites = sites
        self.weights: dict[int, tuple[torch.device, torch.dtype]] = {}  # as they were at first
        self._choices: dict[tuple[Any, ...], NormsBackend | FusedBackend] = {}
        # Backends without factors read the weight each time, but behind a group of layers: there too it must stand for a forward.
        self._weights: list[SiteWeight] = []
        self._forms: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.epoch = 0  # how often `_forms` were forgotten, and so every launch that reads them
        self._launches: dict[tuple[Any, ...], Launch] = {}
        # By GPU: the stream of the last launch of a fused backend.
        self._streams: dict[int, tuple[int, torch.cuda.Stream]] = {}
        self.generation = 0  # how often factors followed a weight that had changed
        self.changed: set[str] = set()  # the names of the sites with such weights since `rebuild`
        self._ranks, self._metrics = ranks, metrics
        # row -> (its bank, its place in it, its view of it)
        self._places: dict[int, tuple[Tensor, int, Tensor]] = {}

    def take_weight(self, row: int, reading: WeightReading) -> None:
        """Make what is needed of one site's weight."""
        site, update, weight = self._sites[row], self._updates.get(row), reading.weight
        self.weights[row] = (weight.device, weight.dtype)
        choice = self._choice(weight.device, weight.dtype, site.head_dim)
        if choice.needs == "weight":
            self._weights.append(SiteWeight(site, update, reading.version))
            return
        factor = self.factors[row] = SiteFactor(site, reading, update)
        factor.make(weight, choice, self.precision)
        self._weights.append(factor)

    def end_of_weights(self) -> None:
        """After the weight of each site."""
        self._watch = WeightWatch(self._weights)
        self._fill_banks()

    def record(
        self,
        rows: Sequence[int],
        inputs: Sequence[Tensor],
        layout: TokenLayout,
        moments: RunningMoments,
        *,
        scale: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> bool:
        """Merge the samples of a group: inputs `[B, S, H·D]` of one shape, dtype and device, of sites of one geometry, all
        different; `scale` `[len(inputs), B, S]` multiplies the norms of the contributions; with `ratio`, of the same shape, 1/‖r‖
        of each token, the ratio to the residual stream is measured too; and so are the mean vectors, if there are
        `moments.vectors`. Never waits for the device. Returns True if an earlier launch was made again.
        """
        x, site = inputs[0], self._sites[rows[0]]
        backend = self._choice(x.device, x.dtype, site.head_dim)
        self.used.add(backend.name)
        token_agg = self.token_agg
        if layout.cu_seqlens is not None and token_agg == "last":
            scale, ratio = (_last_numbers(scale, layout), _last_numbers(ratio, layout))
            inputs, layout = last_tokens(inputs, layout)
            x, token_agg = inputs[0], "token"
        if backend.needs == "form":
            self.follow_stream(x.get_device())
            forms = self._forms_of(backend, rows, x.dtype)
            if layout.cu_seqlens is not None and token_agg == "all":
                # It adds up rows, not segments of them. So it gives the norms of the tokens, and torch adds those up.
                norms = rearrange(backend.token_norms(inputs, forms, scale=scale), "g k h n -> k g n h")
                if moments.vectors is not None:
                    tokens = torch.stack([each.flatten(0, 1) for each in inputs])
                    valid = layout.mask(x)
                    self._vector_reader(rows, moments.vectors)(
                        tokens, norms[1], None if valid is None else valid.flatten()
                    )
                norms = with_ratio(norms, None if ratio is None else ratio.flatten(1))
                packed = packed_samples(norms, *layout.packed(x))
                self._merge_later(_Samples(moments, list(rows), *packed))
                return False
            return self._launch(
                backend,
                forms,
                rows,
                inputs,
                moments,
                layout=layout,
                token_agg=token_agg,
                scale=scale,
                ratio=ratio,
            )
        with exact_arithmetic(x.device.type):
            mask = layout.mask(x)
            cu_seqlens = None if layout.cu_seqlens is None else layout.packed(x)[1]
            for part in self._batches(rows, backend):
                several = part.stop - part.start > 1
                group = torch.stack(list(inputs[part])) if several else inputs[part.start].unsqueeze(0)
                contribution = self._contribution(backend, rows[part], x.device)
                values, present = samples(
                    group,
                    mask,
                    token_agg,
                    site.num_heads,
                    contribution,
                    scale=None if scale is None else scale[part],
                    ratio=None if ratio is None else ratio[part],
                    cu_seqlens=cu_seqlens,
                    read_tokens=None
                    if moments.vectors is None
                    else self._vector_reader(rows[part], moments.vectors),
                )
                taken = _Samples(moments, list(rows[part]), values[:, self._metrics], present)
                if self._ranks is None:
                    self._merge_later(taken)
                else:  # one sum at the end serves all
                    moments.batches.append(taken)
        return False

    def _launch(
        self,
        backend: FusedBackend,
        forms: tuple[Any, ...],
        rows: Sequence[int],
        inputs: Sequence[Tensor],
        moments: RunningMoments,
        *,
        layout: TokenLayout,
        token_agg: str,
        scale: Tensor | None,
        ratio: Tensor | None,
    ) -> bool:
        """Make an earlier launch again, which returns True, or a new one."""
        valid = None if layout.valid is None else layout.mask(inputs[0])
        key = _launch_key(rows, inputs[0], valid, scale, ratio)
        launch = self._launches.get(key)
        if launch is not None and launch.factors == forms:
            addresses = launch.matches(
                inputs, valid, layout.skip_first, is_scaled=scale is not None, has_ratio=ratio is not None
            )
            if addresses is not None and run_again(
                launch, addresses, moments, valid, scale=scale, ratio=ratio
            ):
                return True
        launch = backend.record(
            inputs,
            forms,
            moments.buffer,
            rows,
            token_agg=token_agg,
            valid=valid,
            skip_first=layout.skip_first,
            scale=scale,
            ratio=ratio,
            vectors=None if moments.vectors is None else moments.vectors.buffer,
        )
        self._launches.pop(key, None)
        if launch is not None:
            if len(self._launches) >= MOST_LAUNCHES:
                del self._launches[next(iter(self._launches))]
            self._launches[key] = launch
        return False

    def _vector_reader(self, rows: Sequence[int], vectors: RunningMeanVectors) -> TokenReader:
        """Return a function that merges tokens into the mean vectors of these rows."""

        def read(x: Tensor, norms: Tensor, present: Tensor | None) -> None:
            z = x.unflatten(-1, (norms.shape[-1], -1))
            vectors.update(_as_slice(rows), z, norms.double().square(), present)

        return read

    def follow_stream(self, index: int) -> None:
        """Let the current stream of the GPU `index` (-1: none) wait for the launches of these factors on another one: launches
        that share a factor, which counts the programs that have ended, must not overlap.
        """
        if index < 0:
            return
        known = self._streams.get(index)
        raw = torch._C._cuda_getCurrentRawStream(index)
        if known is None or known[0] != raw:
            current = torch.cuda.current_stream(index)
            if not torch.cuda.is_current_stream_capturing():  # a graph may wait for nothing outside it
                if known is not None:
                    current.wait_stream(known[1])
                self._streams[index] = raw, current

    def launch_of(
        self, rows: Sequence[int], x: Tensor, layout: TokenLayout, *, has_ratio: bool
    ) -> Launch | None:
        """The launch that `record` has just made for these rows and inputs like `x`; None where it cannot be made again. It
        serves as long as `epoch` does not change.
        """
        return self._launches.get(_launch_key(rows, x, layout.valid, None, x if has_ratio else None))

    def _forms_of(self, backend: FusedBackend, rows: Sequence[int], dtype: torch.dtype) -> tuple[Any, ...]:
        """The factors of these rows as the backend reads them; asked for once until one changes, or all were verified."""
        key = (dtype, *rows)
        forms = self._forms.get(key)
        if forms is None:
            forms = tuple(self.factors[row].form(backend, dtype, self.precision) for row in rows)
            self._forms[key] = forms
        return forms

    def stale(self) -> list[str]:
        """The names of the sites whose weight is not the one that the factor was made from. Waits for the device."""
        self._forget_forms()  # to be asked for again, so that they are verified again
        return [factor.site.name for factor in self.factors.values() if not factor.verify()]

    def finish(self, moments: RunningMoments) -> None:
        """Merge the samples that wait for `moments`. To be called before anybody looks at these; on every rank, where there are
        some.
        """
        if self._ranks is not None and moments.batches:
            local, moments.batches = moments.batches, []
            self._ranks.relate([part.values for part in local])
            for part in local:
                self._merge_later(part)
        self._merge(moments)

    def _merge(self, moments: RunningMoments) -> None:
        waiting, moments.batches = moments.batches, []
        if waiting:
            first = waiting[0]
            rows = [row for part in waiting for row in part.rows]
            values = torch.cat([part.values for part in waiting], dim=2) if len(waiting) > 1 else first.values
            moments.update(_as_slice(rows), values, first.present)

    def _merge_later(self, part: "_Samples") -> None:
        """Samples are small and a merge is many small steps: those of several layers are merged at once."""
        waiting = part.moments.batches
        if waiting and not part.joins(waiting):
            self._merge(part.moments)
        part.moments.batches.append(part)
        if part.values.numel() > LATE_ELEMENTS:
            self._merge(part.moments)

    def _batches(self, rows: Sequence[int], backend: NormsBackend) -> list[slice]:
        """The group as one batch where its factors lie side by side, else layer by layer."""
        places = [self._places.get(row) for row in rows]
        first = places[0]
        if backend.needs == "factor" and first is not None:
            bank, start, _ = first
            if all(
                # a weight that moved to another device took its factor out of the bank
                p is not None and p[0] is bank and p[1] == start + i and self.factors[rows[i]].dense() is p[2]
                for i, p in enumerate(places)
            ):
                return [slice(0, len(rows))]
        return [slice(i, i + 1) for i in range(len(rows))]

    def _contribution(
        self, backend: NormsBackend, rows: Sequence[int], device: torch.device
    ) -> ContributionNorms:
        """The backend with the weights of these rows: of one, or of several whose factors lie side by side."""
        first = rows[0]
        if backend.needs == "weight":
            weights = self._weight(first).to(device).unflatten(1, (self._sites[first].num_heads, -1))[None]
        elif len(rows) == 1:
            weights = self.factors[first].dense().unsqueeze(0).to(device)
        else:
            bank, start, _ = self._places[first]
            weights = bank[start : start + len(rows)]
        return lambda z: backend.contribution_norms(z.flatten(2), weights)

    def _weight(self, row: int) -> Tensor:
        weight = dense_weight(self._sites[row])
        if row not in self._updates:
            return weight
        gain = self._updates[row].gain(weight.shape[0], weight.device)
        # float32 for a bfloat16 weight: its product with the gain is no bfloat16.
        return (weight.double() * gain.unsqueeze(1)).to(torch.promote_types(weight.dtype, torch.float32))

    def _fill_banks(self) -> None:
        """Lay the dense factors of layers of one shape side by side, so that one product serves a group of them."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for row, factor in self.factors.items():
            site, (device, dtype) = self._sites[row], factor.place
            if self._choice(*self.weights[row], site.head_dim).needs == "factor":
                alike.setdefault((device, dtype, site.num_heads, site.head_dim), []).append(row)
        for (device, dtype, heads, head_dim), rows in alike.items():
            with torch.inference_mode(False):
                bank = torch.empty(len(rows), heads, head_dim, head_dim, dtype=dtype, device=device)
            for place, row in enumerate(rows):
                view = bank[place]
                self.factors[row].keep_dense_in(view)
                self._places[row] = (bank, place, view)

    def refresh(self, before: Callable[[], None] | None = None) -> None:
        """Rebuild the factors of weights that are known to have changed, after a call of `before`; waits for nothing."""
        if self._watch.moved():
            if before is not None:
                before()
            moved = [w.site.name for w in self._weights if w.moved() and not w.moves_itself]
            if moved:
                self.generation += 1
                self.changed.update(moved)
            self._watch.refresh()
            self._forget_forms()

    def rebuild(self) -> None:
        """Make every factor anew of the weight as it is now."""
        self._forget_forms()
        self.changed.clear()
        for factor in self.factors.values():
            factor.rebuild()

    def mark_changed(self) -> None:
        """The weights may have changed without a trace."""
        self._watch.mark_changed()
        self._forget_forms()

    def _forget_forms(self) -> None:
        self._forms = {}
        self.epoch += 1

    def check_unmoved(self, generation: int) -> None:
        """Raises StaleFactorError where a weight changed during a forward, at whose start `generation` was what it was then."""
        if generation == self.generation and not self._watch.moved():
            return
        moved = [weight.site.name for weight in self._weights if weight.moved() and not weight.moves_itself]
        if generation != self.generation:  # another forward that began meanwhile let the factors follow
            moved = moved or ["some projections"]
        if moved:
            raise StaleFactorError(
                f"the weight of {', '.join(moved)} changed during a forward, which was not counted: no one weight acts in it, "
                "whatever the backend. Change weights between forwards, or take off the hook that does"
            )

    def _choice(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> NormsBackend | FusedBackend:
        key = (device, dtype, head_dim)
        if key not in self._choices:
            self._choices[key] = backend_for(self.backend, device, dtype, head_dim)
        return self._choices[key]


def run_again(
    launch: Launch,
    addresses: Sequence[int],
    moments: RunningMoments,
    valid: Tensor | None,
    *,
    scale: Tensor | None = None,
    ratio: Tensor | None = None,
    scratch: Tensor | None = None,
) -> bool:
    """Run an earlier launch for `moments`, with the mean vectors if they are measured; as `Launch.run`."""
    vectors = None if moments.vectors is None else moments.vectors.buffer
    return launch.run(
        addresses, moments.buffer, valid, scale=scale, ratio=ratio, scratch=scratch, vectors=vectors
    )


def _launch_key(
    rows: Sequence[int], x: Tensor, valid: Tensor | None, scale: Tensor | None, ratio: Tensor | None
) -> tuple[Any, ...]:
    return (x.shape, x.dtype, x.get_device(), valid is None, scale is None, ratio is None, *rows)


def _last_numbers(numbers: Tensor | None, layout: TokenLayout) -> Tensor | None:
    """As `last_tokens`, for a number of each layer and token, `[G, B, S]`."""
    if numbers is None:
        return None
    last, _ = last_tokens([of_layer.unsqueeze(-1) for of_layer in numbers], layout)
    return torch.stack(list(last)).squeeze(-1)


def _as_slice(rows: Sequence[int]) -> slice | list[int]:
    """A slice where the rows follow one another: indexing by it makes views, and nothing is sent to the device."""
    first, count = rows[0], len(rows)
    if list(rows) == list(range(first, first + count)):
        return slice(first, first + count)
    return list(rows)


def read_weights(accumulators: Iterable[Accumulator]) -> None:
    """Read the weight of each of their sites once for all of them, and hold one at a time.

    Raises as `Accumulator` does: now, not in the middle of a run.
    """
    among = list(accumulators)
    for row, site in {row: site for each in among for row, site in each._sites.items()}.items():
        reading = WeightReading(site)
        for each in among:
            if row in each._sites:
                each.take_weight(row, reading)
        del reading
    for each in among:
        each.end_of_weights()
