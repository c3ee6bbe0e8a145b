"""Let chosen KV groups see only the first tokens of a sequence and the last ones, in the forward of the model itself."""

import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastheads.backends.streaming_attention import (
    TokenPlaces,
    Window,
    attention_beyond,
    check_distance,
    of_groups,
    places_of,
    streamed,
)
from fastheads.capture.projection_hook import RetraceHandle
from fastheads.errors import ForwardError, OptionError
from fastheads.intervene.pairs import whole_pair
from fastheads.models.attention import AttentionCall, AttentionTap, cannot_stream, tap_attention
from fastheads.models.sites import (
    HeadSite,
    attention_of,
    decoder_of,
    find_sites,
    known_num_kv_heads,
    unwrapped,
)
from fastheads.stats.token_layout import DecoderArguments, TokenLayout

KvGroups = Iterable[tuple[int, int]]


def streaming(model: nn.Module, kv_groups: KvGroups, *, sink: int, window: int) -> "Streaming":
    """Return a context in which the query heads of these KV groups see `sink` tokens at the start and `window` at the end.

        with streaming(model, [(3, 0), (3, 1)], sink=4, window=256):
            loss = model(**batch, labels=batch["input_ids"]).loss

    A query at position p of its sequence sees the positions below `sink`, and those above p − `window`, itself included;
    positions count valid tokens. All else is the model's own: queries, keys (with the rotations of their true positions), values,
    scale, soft-cap, masks and learned sinks. Later layers see what comes out. It shows what a small cache would cost; none is
    saved.

    Whole sequences are run: of a call with a filled cache (the decode steps of `generate()`) ForwardError is raised, and of
    attention that does not do what its arguments say. The context is for all threads that run the model.

    Args:
        model: a model of transformers whose attention uses its attention interface.
        kv_groups: pairs (layer, KV group); the group's query heads are H / K in a row.
        sink: tokens at the start of a sequence, 0 or more.
        window: the last tokens that are seen, 1 or more.

    Raises:
        OptionError: a pair names no KV group, or its layer cannot be streamed: the message says why.
        NoSitesError: the model has no attention to profile.
    """
    return Streamer(model).streaming(kv_groups, sink=sink, window=window)


class Streamer:
    """Makes contexts of `streaming` for one model, which is looked at once."""

    def __init__(self, model: nn.Module) -> None:
        """Raises NoSitesError if the model has no attention to profile."""
        self.model = unwrapped(model)
        self._sites: dict[int, list[HeadSite]] = {}
        for site in find_sites(self.model):
            self._sites.setdefault(site.layer, []).append(site)

    def streaming(self, kv_groups: KvGroups, *, sink: int, window: int) -> "Streaming":
        """As `streaming()`."""
        limits = Window(sink, window)
        if isinstance(kv_groups, str | bytes | Mapping) or not isinstance(kv_groups, Iterable):
            raise OptionError(f"kv_groups must be pairs (layer, KV group), not {kv_groups!r:.80}")
        by_layer: dict[int, set[int]] = {}
        for pair in kv_groups:
            layer, group = self._checked(pair)
            by_layer.setdefault(layer, set()).add(group)
        chosen = {layer: sorted(groups) for layer, groups in sorted(by_layer.items())}
        return Streaming(self.model, {layer: self._sites[layer][0] for layer in chosen}, chosen, limits)

    def _checked(self, pair: Any) -> tuple[int, int]:
        layer, group = whole_pair(pair, "kv_groups", "(layer, KV group)")
        sites = self._sites.get(layer, [])
        if not sites:
            raise OptionError(
                f"no layer {layer} with attention heads: there are {min(self._sites)} to {max(self._sites)}"
            )
        if len(sites) > 1:
            raise OptionError(f"layer {layer} has several attentions, so that {(layer, group)} is ambiguous")
        number = known_num_kv_heads(self.model, sites[0])
        if not 0 <= group < number:
            raise OptionError(f"no KV group {group} in layer {layer}, which has the groups 0 to {number - 1}")
        why = cannot_stream(attention_of(self.model, sites[0]))
        if why is not None:
            raise OptionError(f"layer {layer} cannot be streamed: {why}")
        return layer, group


class Tapped(AbstractContextManager["Tapped"]):
    """A context in which the attentions of some layers have taps, which know where the tokens of the call are."""

    def __init__(self, model: nn.Module, sites: dict[int, HeadSite], window: Window) -> None:
        """`sites` by layer."""
        self.window = window
        self._model, self._sites = model, sites
        self._decoder = decoder_of(model)
        self._arguments = DecoderArguments(self._decoder)
        self._local = threading.local()
        self._handles: list[Any] = []

    def _take(self, layer: int, call: AttentionCall, output: Tensor, places: TokenPlaces) -> Tensor | None:
        """Look at one call of a layer's attention; return what replaces the output."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._handles:
            raise OptionError("this context is entered already: make another one")
        taps = {attention_of(self._model, site): self._tap(layer) for layer, site in self._sites.items()}
        self._handles = [
            # Code that was compiled before does not see the taps.
            RetraceHandle({site.name: site.module for site in self._sites.values()}),
            self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._decoder.register_forward_hook(self._end),
            tap_attention(taps),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise ForwardError("streaming attention cannot be compiled: run the model without torch.compile")
        if decoder is not self._decoder:
            raise ForwardError("a copy of the model cannot be streamed (DataParallel): run the model itself")
        self._arguments.follow_signature()
        self._local.layout = self._arguments.own_layout(args, kwargs)
        self._local.places, self._local.ran = {}, set()

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        missing = sorted(set(self._sites) - self._local.ran)
        self._local.layout = None
        if missing:
            raise ForwardError(
                f"the attention function of layer {missing[0]} was not called: it cannot be streamed"
            )

    def _tap(self, layer: int) -> AttentionTap:
        def tap(call: AttentionCall, output: Tensor) -> Tensor | None:
            layout = getattr(self._local, "layout", None)
            if layout is None:
                raise ForwardError("streaming attention needs a call of the whole decoder, not of a layer")
            self._local.ran.add(layer)
            places = self._places(layout, output)
            return None if places.shape[1] <= self.window.reach else self._take(layer, call, output, places)

        return tap

    def _places(self, layout: TokenLayout, output: Tensor) -> TokenPlaces:
        known: dict[torch.device, TokenPlaces] = self._local.places
        if output.device not in known:
            shape = (output.shape[0], output.shape[1])
            known[output.device] = places_of(layout, shape, self.window, output.device)
        return known[output.device]


class Streaming(Tapped):
    """The context that `streaming` returns. It may be entered again once it was left."""

    def __init__(
        self, model: nn.Module, sites: dict[int, HeadSite], groups: dict[int, list[int]], window: Window
    ) -> None:
        """`sites` and `groups` by layer."""
        super().__init__(model, sites, window)
        self._groups = groups
        self._unchecked = set(groups)  # layers

    @property
    def kv_groups(self) -> list[tuple[int, int]]:
        """The KV groups that see a window, as sorted pairs (layer, KV group)."""
        return [(layer, group) for layer, groups in self._groups.items() for group in groups]

    def _take(self, layer: int, call: AttentionCall, output: Tensor, places: TokenPlaces) -> Tensor:
        part, heads = of_groups(call, torch.tensor(self._groups[layer], device=output.device))
        check = layer in self._unchecked
        z, distance = streamed(part, output[:, :, heads], places, self.window, check=check)
        if distance is not None:
            check_distance(call.module, distance, output.dtype)
            self._unchecked.discard(layer)
        return output.index_copy(2, heads, z)


class AttentionMass(Tapped):
    """A context that measures, of each head, the share of the attention that is on keys outside sink and window: its mean over
    the tokens beyond sink + window, in eager code. The baseline of what the streaming error is compared with.
    """

    def __init__(self, model: nn.Module, window: Window) -> None:
        """Take every layer whose attention function can be tapped. Raises NoSitesError if the model has nothing to profile."""
        model = unwrapped(model)
        sites = {site.layer: site for site in find_sites(model)}
        seen = {layer: s for layer, s in sites.items() if cannot_stream(attention_of(model, s)) is None}
        super().__init__(model, seen, window)
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}

    def _take(self, layer: int, call: AttentionCall, output: Tensor, places: TokenPlaces) -> None:
        with torch.no_grad():
            share = attention_beyond(call, places, self.window)
            total = torch.where(places.beyond[:, :, None], share, 0.0).double().sum(dim=(0, 1))
            # On their device, so that no call waits for it.
            self._sums[layer] = self._sums.get(layer, 0) + total
            self._tokens[layer] = self._tokens.get(layer, 0) + places.beyond.sum()

    def of_kv_groups(self) -> dict[tuple[int, int], float]:
        """Return the mean over the query heads of each KV group, by (layer, KV group); NaN without tokens."""
        found = {}
        for layer, total in self._sums.items():
            groups = known_num_kv_heads(self._model, self._sites[layer])
            means = total.cpu().view(groups, -1).mean(dim=1) / int(self._tokens[layer])  # 0/0 is NaN
            found.update({(layer, group): mean for group, mean in enumerate(means.tolist())})
        return found
