"""Find the residual stream that an attention block's output is added to, and where it can be read during a forward.

With r the stream `[batch, seq, hidden]` and a the output projection's output, a layer computes r + update(a) (`residual` says what
update is). r is the input of some module of the layer, mostly of the layer itself; which, is read from the source of the layer's
forward (`dataflow`), or a registered family says it.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from fastheads.errors import OptionError, UnsupportedWeightError
from fastheads.models.dataflow import Stream, UnreadableError, stream_in
from fastheads.models.families import Family, builtin_family, registered_family
from fastheads.models.residual import KNOWN_PACKAGES
from fastheads.models.sites import WRAPPER_PACKAGES, HeadSite, registered_attention_of


class UnknownStreamError(UnsupportedWeightError):
    """It is not known which residual stream an attention's output is added to."""


@dataclass(frozen=True, eq=False)
class StreamSource:
    """A module whose call shows the residual stream: it is an argument of it, by position or by name.

    A forward pre-hook `(module, args, kwargs)` on `module` sees it before the projection runs. A module that is called several
    times in a forward has the stream of the projection's next call.
    """

    module: nn.Module
    position: int = 0
    keyword: str | None = None  # None: the first keyword argument, where none is passed by position
    layer: nn.Module | None = None  # that has the multiplier
    multiplier: str | None = None  # of the stream, before the sum: a number, or a tensor that broadcasts with it
    norm: str | None = None  # class of a norm after the sum, as in post-LN models: it is not applied
    is_overwritten: bool = False  # during the layer's call: a reference to it holds other numbers later

    @property
    def post_norm(self) -> bool:
        """True if a norm comes between the sum and all that reads it."""
        return self.norm is not None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the residual stream `[batch, seq, hidden]` from the arguments of a call: the tensor itself, if there is no multiplier.

        Raises UnknownStreamError if it is none of them.
        """
        if self.position < len(args):
            stream = args[self.position]
        elif self.keyword is not None:
            stream = kwargs.get(self.keyword)
        else:
            stream = next(iter(kwargs.values()), None)
        if not isinstance(stream, Tensor):
            raise UnknownStreamError(f"{type(self.module).__name__} was called without the residual stream")
        return stream if self.multiplier is None else stream * attrgetter(self.multiplier)(self.layer)

    def __str__(self) -> str:
        """Describe it for a profile's metadata."""
        scaled = "" if self.multiplier is None else f", times {self.multiplier}"
        normed = "" if self.norm is None else f", before the {self.norm} of the sum"
        return f"input of {type(self.module).__name__}{scaled}{normed}"


def stream_of(model: nn.Module, site: HeadSite) -> StreamSource:
    """Find the residual stream that the output of `site` is added to. Reads source files: milliseconds for each class of layers.

    Raises:
        UnknownStreamError: it is not known; the message says why.
        OptionError: a registered family does not fit the layer.
    """
    parts = site.name.split(".")
    registered = registered_attention_of(model, site)
    attention_depth = len(parts) if registered is None else registered[1]
    below = attention_depth  # number of parts of the path to the child whose output is followed
    for depth in range(len(parts) - 1, -1, -1):
        above = model.get_submodule(".".join(parts[:depth]))
        family = registered_family("layer", above)
        if family is None:
            if depth >= attention_depth or type(above).__module__.startswith(WRAPPER_PACKAGES):
                continue  # inside a registered attention, or a wrapper that is called as what it wraps
            if not type(above).__module__.startswith(KNOWN_PACKAGES):
                raise UnknownStreamError(
                    f"what a {_kind(above)}, which is not of transformers, adds it to is not known"
                )
            family = builtin_family("layer", above)
        target = ".".join(parts[depth:below])
        source = _in_layer(above, target, family)
        if source is not None:
            return source
        below = depth
    raise UnknownStreamError("no layer adds it to anything")


def _in_layer(layer: nn.Module, target: str, family: Family | None) -> StreamSource | None:
    """Return the stream that `layer` adds the output of `target` to; None if it hands the output on as it is."""
    kind = _kind(layer)
    if family is not None and family.stream_unknown is not None:
        raise UnknownStreamError(f"the residual stream of a {kind} is not known: {family.stream_unknown}")
    if family is not None and family.child not in (None, target.split(".")[0]):
        raise UnknownStreamError(f"what a {kind} adds {target} to is not known")
    if family is not None and family.stream is not None:
        try:
            inside = "" if family.stream == "." else family.stream
            return StreamSource(layer.get_submodule(inside), layer=layer)
        except AttributeError:
            raise OptionError(
                f"family {family.name!r}: stream is {family.stream!r}, which a {kind} has not"
            ) from None
    try:
        found = stream_in(layer, target)
    except UnreadableError as error:
        raise UnknownStreamError(f"the residual stream of a {kind} is not known: {error}") from error
    return None if found is None else _source(layer, found)


def _source(layer: nn.Module, found: Stream) -> StreamSource:
    module = layer if found.child is None else layer.get_submodule(found.child)
    norm = None if found.norm is None else _kind(layer.get_submodule(found.norm))
    position, keyword = (0, None) if found.child is not None else (found.position, found.name)
    return StreamSource(module, position, keyword, layer, found.multiplier, norm, found.in_place)


def _kind(module: nn.Module) -> str:
    return type(module).__name__
