"""Check that a projection's input has its site's width, and the tokens of the decoder's call."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.capture.forward import Forward
from fastheads.capture.profiled import Profiled, TracedSite
from fastheads.errors import ForwardError
from fastheads.models.sites import HeadSite, attention_of, decoder_of, has_known_layout
from fastheads.stats.token_layout import TokenLayout


class InputCheck:
    """Checks inputs `[batch, seq, width]` against the token layout of the decoder's call.

    Where batch and seq are equal, a transposed input would pass unseen: then the layout must be known, from a table or from an
    earlier input.
    """

    def __init__(self, model: nn.Module, sites: list[HeadSite], rows: dict[int, HeadSite]) -> None:
        """`rows`: the sites that are profiled, by row."""
        self._model, self._sites = model, sites
        # Rows whose layout no table knows, and with which forward of the attention an input has shown it.
        self.unknown = {row for row, site in rows.items() if not has_known_layout(model, site)}
        self._shown: dict[int, tuple[Any, Any]] = {}

    def check(self, forward: Forward, site: Profiled | TracedSite, x: Tensor) -> None:
        """Raise ForwardError if an input cannot be measured correctly."""
        layout = forward.layout
        if layout is None:
            decoder = decoder_of(self._model)
            if not torch.compiler.is_compiling() and _forward_is_running(decoder):
                kind = type(decoder).__name__
                raise ForwardError(
                    f"{site.name}: {kind}.forward() was called directly, which runs no hooks, so that its valid tokens are not "
                    f"known. Call the module itself, as {kind}(...) does; where that code is not yours, profile the {kind} alone "
                    "and call it with the same inputs"
                )
            raise ForwardError(
                f"{site.name} ran outside the decoder's own call: its valid tokens are not known. "
                "Profile a tower as a model of its own"
            )
        if type(x) is not Tensor and not torch.compiler.is_compiling():
            raise ForwardError(f"{site.name}: an input of type {type(x).__name__} cannot be measured")
        if layout.tokens is None:
            layout = forward.layout = layout.settled(x.shape)
        _check_shape(site, x, layout)
        if torch.compiler.is_compiling():  # of a layout that is known nothing is asked: it would be guarded
            known = site.row not in self.unknown or site.row in self._shown
        else:
            known = self._shows_layout(site.row, x)
        if not known and x.shape[0] == x.shape[1] > 1:
            raise ForwardError(
                f"{site.name}: its input is {list(x.shape[:2])}, so that rows and tokens cannot be told apart: its module "
                "is none of transformers, whose layouts are known. First run a batch with more tokens than rows, or fewer"
            )

    def _shows_layout(self, row: int, x: Tensor) -> bool:
        """Return True if the batch dimension of `x` is known, from its shape, which is noted, or from an earlier input."""
        is_square = x.shape[0] == x.shape[1] > 1
        if not is_square and row not in self.unknown:
            return True
        site = self._sites[row]
        owner = attention_of(self._model, site)
        forward = type(owner).forward, vars(owner).get("forward")
        if x.shape[0] != x.shape[1]:
            self._shown[row] = forward
        if not is_square or self._shown.get(row) == forward or has_known_layout(self._model, site):
            return True
        self.unknown.add(row)  # somebody replaced its forward since: from now on each input is looked at
        return False


def _forward_is_running(module: nn.Module) -> bool:
    """True if `module.forward` is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _check_shape(site: Profiled | TracedSite, x: Tensor, layout: TokenLayout) -> None:
    if x.dim() != 3 or x.shape[-1] != site.width:
        raise ForwardError(f"{site.name}: expected an input [batch, seq, {site.width}], got {list(x.shape)}")
    if layout.tokens != x.shape[:2]:
        raise ForwardError(
            f"{site.name}: its input is over {list(x.shape[:2])} tokens and the decoder's call over {layout.described()}: the "
            "model pads, shortens, splits or transposes its sequences on the way, so that its valid tokens are not known"
        )
