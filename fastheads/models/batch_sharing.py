"""Decide which sequences may share a batch, so that each gets the numbers that it would get alone.

In most models the rows of a batch are independent. Some use one rotary table for the whole batch, which depends on its width:
"longrope" (Phi-3 and others) switches to another table beyond the original length, "dynamic" NTK makes one for each length
beyond it, and keeps it for later forwards. Some quantized layers scale, or split, their input by the values of all rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastheads.errors import OptionError
from fastheads.models.sites import decoder_of


@dataclass(frozen=True)
class Sharing:
    """The rule for which rows may share a batch; by default all.

    bounds: lengths in tokens; rows up to a bound and longer rows do not share a batch.
    equal_beyond: rows longer than this share a batch only with rows of equal length.
    alone: the reason why no two rows may share a batch; None if they may.
    """

    bounds: tuple[int, ...] = ()
    equal_beyond: int | None = None
    alone: str | None = None

    @property
    def by_width(self) -> bool:
        """True if a row's numbers depend on the width, or the positions, of its batch."""
        return bool(self.bounds) or self.equal_beyond is not None

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Group the indices of rows that may share batches with one another; longest rows first."""
        found: dict[tuple[int, int], list[int]] = {}
        for row, length in enumerate(lengths):
            above = sum(length > bound for bound in self.bounds)
            own = length if self.equal_beyond is not None and length > self.equal_beyond else 0
            found.setdefault((above, own), []).append(row)
        return [found[key] for key in sorted(found, reverse=True)]

    def described(self) -> dict[str, Any] | None:
        """Return the rule as JSON values; None for the default."""
        return None if self == Sharing() else asdict(self) | {"bounds": list(self.bounds)}


def sharing_of(model: nn.Module) -> Sharing:
    """Derive the rule for `model` from its configuration and its layers.

    Raises:
        OptionError: its numbers depend on earlier forwards, in a way that cannot be undone.
    """
    decoder = decoder_of(model)
    bounds: set[int] = set()
    grown: list[int] = []
    for config in _configs(decoder):
        longest = _setting(config, "max_position_embeddings")
        for rope in _ropes(config):
            kind = str(rope.get("rope_type", rope.get("type")))
            original = rope.get("original_max_position_embeddings") or _setting(
                config, "original_max_position_embeddings"
            )
            if kind in ("longrope", "su") or "long_mscale" in rope:
                bounds.add(original or longest)
            elif "dynamic" in kind:
                grown.append(longest)
    for module in decoder.modules():
        if getattr(module, "attention_type", None) == "block_sparse" and hasattr(
            module, "set_attention_type"
        ):
            raise OptionError(
                "block-sparse attention depends on earlier batches: call "
                "model.set_attention_type('original_full') first"
            )
    return Sharing(
        bounds=tuple(sorted(bound for bound in bounds if isinstance(bound, int))),
        equal_beyond=min((length for length in grown if isinstance(length, int)), default=None),
        alone=next(filter(None, map(_mixes_rows, decoder.modules())), None),
    )


def grows_with_length(model: nn.Module) -> bool:
    """True if the model's rotary tables extend to any length, so that `max_position_embeddings` is no limit."""
    ropes = (rope for config in _configs(decoder_of(model)) for rope in _ropes(config))
    return any("dynamic" in str(rope.get("rope_type", rope.get("type"))) for rope in ropes)


class RotaryState:
    """The tables that "dynamic" rotary embeddings keep from one forward to the next.

    `reset()` makes the next forward independent of earlier ones; `restore()` puts back the tables found at construction.
    """

    def __init__(self, model: nn.Module) -> None:
        self._resets: list[Callable[[], None]] = []
        self._restores: list[Callable[[], None]] = []
        for module in decoder_of(model).modules():
            kinds = getattr(module, "rope_type", None)
            named = kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]
            for layer_type, kind in named:
                prefix = "" if layer_type is None else f"{layer_type}_"
                if "dynamic" in str(kind) and hasattr(module, f"{prefix}original_inv_freq"):
                    self._follow(module, prefix)

    def _follow(self, module: Any, prefix: str) -> None:
        table, longest = f"{prefix}inv_freq", f"{prefix}max_seq_len_cached"
        held, own = getattr(module, table), vars(module).get(longest)

        def reset() -> None:
            original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, table).device)
            module.register_buffer(table, original, persistent=False)
            setattr(module, longest, module.original_max_seq_len)

        def restore() -> None:
            module.register_buffer(table, held, persistent=False)
            if own is None:
                vars(module).pop(longest, None)
            else:
                setattr(module, longest, own)

        self._resets.append(reset)
        self._restores.append(restore)

    def reset(self) -> None:
        for reset in self._resets:
            reset()

    def restore(self) -> None:
        for restore in self._restores:
            restore()


def _configs(decoder: nn.Module) -> list[Any]:
    """Return the configurations of the decoder and of its modules with rotary tables, each once."""
    modules = (m for m in decoder.modules() if m is decoder or hasattr(m, "rope_type"))
    found: list[Any] = []
    for module in modules:
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if config is not None and not any(config is other for other in found):
            found.append(config)
    return found


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary settings; if layer types differ, those of each type."""
    rope = _setting(config, "rope_parameters") or _setting(config, "rope_scaling")
    if not isinstance(rope, Mapping):
        return
    by_layer = [part for part in rope.values() if isinstance(part, Mapping)]
    yield from by_layer or [rope]


def _setting(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a configuration that differs by layer raises for such names
        return None


def _mixes_rows(module: nn.Module) -> str | None:
    """Return the reason why the rows of a layer's input affect each other; None if they do not."""
    state = getattr(module, "state", None)
    if type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0.0) > 0:
        return "LLM.int8() splits off features of the whole batch if one token has an outlier there"
    weight = getattr(module, "weight", None)
    if _is_per_tensor(getattr(weight, "act_quant_kwargs", None)):
        return "its layers scale the activations of the whole batch by one number"
    scheme = getattr(module, "quantization_scheme", None)  # of compressed-tensors
    inputs = getattr(scheme, "input_activations", None)
    if getattr(inputs, "dynamic", False) is True and _name(getattr(inputs, "strategy", None)) == "tensor":
        return "its layers scale the activations of the whole batch by one number"
    return None


def _is_per_tensor(options: Any) -> bool:
    """True if torchao scales an input by one number, computed in each forward."""
    return type(getattr(options, "granularity", None)).__name__ == "PerTensor"


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
