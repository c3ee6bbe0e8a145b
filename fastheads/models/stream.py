"""Find the residual stream that an attention block's output is added to, and where it can be read during a forward.

With r the stream `[batch, seq, hidden]` and a the output projection's output, a layer computes r + update(a) (`residual` says
what update is). r is the input of some module of the layer, mostly of the layer itself. Which one is read from the source of the
layer's forward (`dataflow`), or a registered family says it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from fastheads.errors import OptionError, UnsupportedWeightError
from fastheads.models.dataflow import UnreadableError, norm_after, stream_in
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
    multiplier: str | None = (
        None  # of the stream, before the sum: a number, or a tensor that broadcasts with it
    )
    norm: str | None = None  # class of a norm after the sum, as in post-LN models: it is not applied
    is_overwritten: bool = False  # during the layer's call: a reference to it holds other numbers later

    @property
    def post_norm(self) -> bool:
        """True if a norm comes between the sum and all that reads it."""
        return self.norm is not None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the residual stream `[batch, seq, hidden]` from the arguments of a call: the tensor itself, unless multiplied.

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
    levels = _levels(model, site)
    for module, target, family in levels:
        source, is_returned = _in_module(module, target, family)
        if source is not None:
            return replace(source, norm=_norm_outside(levels)) if is_returned else source
    raise UnknownStreamError("nothing in the model adds it to anything")


# A module on the way from the projection outwards, the path in it to the one before, and its family as a layer.
Level = tuple[nn.Module, str, Family | None]


def _levels(model: nn.Module, site: HeadSite) -> Iterator[Level]:
    """Yield the modules around the projection, from the inside, whose forward the projection's output passes.

    Raises UnknownStreamError at a module that nobody knows.
    """
    parts = site.name.split(".")
    registered = registered_attention_of(model, site)
    # The projection's output is that of a registered family's attention, whatever it looks like inside.
    below = len(parts) if registered is None else registered[1]
    for depth in range(below - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        family, package = registered_family("layer", module), type(module).__module__
        if family is None and package.startswith(WRAPPER_PACKAGES):
            continue  # called as what it wraps, or a list
        if family is None and not package.startswith(KNOWN_PACKAGES):
            raise UnknownStreamError(
                f"what a {_kind(module)}, which is not of transformers, adds it to is not known"
            )
        yield module, ".".join(parts[depth:below]), family or builtin_family("layer", module)
        below = depth


def _in_module(module: nn.Module, target: str, family: Family | None) -> tuple[StreamSource | None, bool]:
    """Return the stream that `module` adds the output of `target` to, None if it hands the output on unadded; and True if the sum
    is only returned.
    """
    kind = _kind(module)
    if family is not None:
        reason = family.stream_unknown
        if family.stream is None:
            reason = reason or family.update_unknown  # it would be told in vain, and nothing has tried it
        if reason is not None:
            raise UnknownStreamError(f"the residual stream of a {kind} is not known: {reason}")
        if family.child not in (None, target.split(".", maxsplit=1)[0]):
            raise UnknownStreamError(f"what a {kind} adds {target} to is not known")
        if family.stream is not None:
            return StreamSource(_named_module(module, family)), False
    try:
        found = stream_in(module, target)
    except UnreadableError as error:
        raise UnknownStreamError(f"the residual stream of a {kind} is not known: {error}") from error
    if found is None:
        return None, False
    read = module if found.child is None else module.get_submodule(found.child)
    norm = None if found.norm is None else _kind(module.get_submodule(found.norm))
    facts = (module, found.multiplier, norm, found.in_place)
    return StreamSource(read, found.position, found.name or None, *facts), found.is_returned


def _named_module(layer: nn.Module, family: Family) -> nn.Module:
    try:
        return layer.get_submodule("" if family.stream == "." else family.stream or "")
    except AttributeError:
        raise OptionError(
            f"family {family.name!r}: stream is {family.stream!r}, which a {_kind(layer)} has not"
        ) from None


def _norm_outside(levels: Iterator[Level]) -> str | None:
    """Return the class of the norm that an outer module applies to the sum, before anything else reads it."""
    try:
        for module, target, _ in levels:
            norm, is_returned = norm_after(module, target)
            if not is_returned:
                return None if norm is None else _kind(module.get_submodule(norm))
    except (UnknownStreamError, UnreadableError):
        pass
    return None


def _kind(module: nn.Module) -> str:
    return type(module).__name__
