"""The port to what runs the model: everything that the capture must know of it.

`TransformersEngine` is the one for models of transformers, whose forwards are told of by hooks (`attach.py`). Another engine
implements `Engine`, and calls `start`, `measure`, `finish`, `commit` and `abandon` of a `Recorder` itself.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from fastheads.backends.tensor_parallel import Ranks
from fastheads.errors import TokensError
from fastheads.models.families import rows_of_ids
from fastheads.models.sites import HeadSite, decoder_of, is_sequence_first
from fastheads.stats.token_layout import DecoderArguments, TokenLayout, TokenMask


class Engine(Protocol):
    """What runs a model: its decoder's calls, their tokens, and what a site's input and output are."""

    decoder: nn.Module  # the module whose calls have a token layout: one at a time in a forward

    def token_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """The valid tokens of a call of the decoder, and where its sequences begin and end. Raises TokensError."""

    def own_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """As `token_layout`, of all tokens that the call itself does not take for padding."""

    def as_is(self, row: int) -> bool:
        """True if `input` and `output` of this site give back what they are given."""

    def input(self, row: int, x: Tensor) -> Tensor:
        """The input of the site's projection as `[batch, seq, width]` of the heads that are measured here."""

    def output(self, row: int, y: Tensor) -> Tensor:
        """The output of the site's projection as `[batch, seq, hidden]`."""


class TransformersEngine:
    """A model of transformers."""

    def __init__(
        self, model: nn.Module, sites: Mapping[int, HeadSite], ranks: Ranks | None, skip_first: int
    ) -> None:
        """`sites` by row; `ranks`, those that share their heads; `skip_first` valid tokens of each sequence are left out."""
        self.decoder = decoder_of(model)
        self._arguments = DecoderArguments(self.decoder, rows_of_ids(self.decoder))
        self._ranks, self._skip_first = ranks, skip_first
        self._sequence_first = frozenset(row for row, site in sites.items() if is_sequence_first(model, site))

    def follow_signature(self) -> None:
        """Read the decoder's signature again if somebody replaced its `forward`."""
        self._arguments.follow_signature()

    def overridden(self, mask: TokenMask) -> AbstractContextManager[None]:
        """A context in which `mask` says which tokens are valid (`HookManager.token_mask`)."""
        return self._arguments.overridden(mask)

    def token_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """As `Engine`; the arguments say it."""
        return self._arguments.token_layout(args, kwargs, self._skip_first)

    def own_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """As `Engine`."""
        return self._arguments.own_layout(args, kwargs)

    def check_call(self, kwargs: dict[str, Any]) -> None:
        """Raise TokensError for arguments of the model or its decoder under which no one weight acts."""
        if kwargs.get("adapter_names") is not None:
            raise TokensError(
                "a batch with an adapter for each row (adapter_names) has no one weight to measure with"
            )

    def as_is(self, row: int) -> bool:
        """As `Engine`."""
        return row not in self._sequence_first and (self._ranks is None or self._ranks.takes_own_heads(row))

    def input(self, row: int, x: Tensor) -> Tensor:
        """As `Engine`: this rank's part, transposed where the model is sequence first."""
        if self._ranks is not None:
            x = self._ranks.own_part(row, x)
        return self._batch_first(row, x)

    def output(self, row: int, y: Tensor) -> Tensor:
        """As `Engine`."""
        return self._batch_first(row, y)

    def _batch_first(self, row: int, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if row in self._sequence_first and x.dim() == 3 else x
