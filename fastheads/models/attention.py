"""See what an attention function of transformers is given and gives back, and put something else in its place.

Attention modules of transformers ask `ALL_ATTENTION_FUNCTIONS` for the function that computes softmax(q kᵀ) v: sdpa, flash, flex,
or their own `eager_attention_forward`. While a module is tapped, what it gets is that function with the tap around it; the
function itself is called with the same arguments, so that its output is the same, bit for bit. Other modules get it as it is.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.errors import ForwardError

# Names that the forward of an attention module uses if it asks transformers for its attention function.
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
GET = "get_interface"
# Keyword arguments that do not change the result, or that `AttentionCall` holds.
KNOWN = frozenset(
    (
        *(
            "dropout",
            "scaling",
            "softcap",
            "s_aux",
            "is_causal",
            "sliding_window",
            "position_ids",
            "use_cache",
        ),
        *(
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
            "output_attentions",
            "return_dict",
        ),
        *(
            "output_hidden_states",
            "output_router_logits",
            "logits_to_keep",
            "num_items_in_batch",
            "cache_position",
        ),
        *(
            "kernel_options",
            "layer_idx",
            "deterministic",
            "token_type_ids",
            "input_ids",
            "labels",
            "past_key_values",
        ),
    )
)
# Types of layers, in a configuration's `layer_types`, whose attention sees all tokens before it.
FULL = ("full_attention", "attention", "hybrid", "moe")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call of an attention function, for causal attention without dropout.

    Shapes: query `[B, H, S, D]`, key `[B, K, S, D]`, value `[B, K, S, Dv]`, each KV head serves H / K query heads in a row.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any  # [B or 1, H or 1, S, S], bool or added to the scores; a BlockMask; [B, S]; or None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # learned: a score [H] that takes part in the softmax and has no value


# Called with the call and the function's output `[B, S, H, Dv]`; what it returns goes to the model (None: the output itself).
AttentionTap = Callable[[AttentionCall, Tensor], Tensor | None]


class _Taps:
    """The taps of this process, by the id of the attention module, and the place where they are called."""

    def __init__(self) -> None:
        self.by_module: dict[int, tuple[nn.Module, list[AttentionTap]]] = {}
        self.lock = threading.Lock()
        self.before: Any = None  # what stood on the interface itself before ours

    def add(self, module: nn.Module, tap: AttentionTap) -> None:
        with self.lock:
            if not self.by_module:
                self._install()
            self.by_module.setdefault(id(module), (module, []))[1].append(tap)

    def remove(self, module: nn.Module, tap: AttentionTap) -> None:
        with self.lock:
            taps = self.by_module[id(module)][1]
            taps.remove(tap)
            if not taps:
                del self.by_module[id(module)]
            if not self.by_module:
                self._uninstall()

    def _install(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as interface

        self.before = vars(interface).get(GET)
        get = getattr(interface, GET)

        def get_interface(implementation: Any, default: Callable[..., Any]) -> Callable[..., Any]:
            return self.around(get(implementation, default))

        setattr(interface, GET, get_interface)

    def _uninstall(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as interface

        if self.before is None:
            vars(interface).pop(GET, None)
        else:  # somebody else replaced it too
            setattr(interface, GET, self.before)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with the taps of the module that calls it around it."""

        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = function(module, *args, **kwargs)
            found = self.by_module.get(id(module))
            if found is None or found[0] is not module:
                return result
            if torch.compiler.is_compiling():
                raise ForwardError(
                    f"the attention of a {type(module).__name__} cannot be seen in compiled code: run without torch.compile"
                )
            output, *others = result
            for tap in tuple(found[1]):
                replaced = tap(_call_of(module, output, args, kwargs), output)
                output = output if replaced is None else replaced
            return (output, *others)

        return attention


_taps = _Taps()


class TapHandle:
    """Removes taps from attention modules."""

    def __init__(self, taps: Mapping[nn.Module, AttentionTap]) -> None:
        self._taps = dict(taps)

    def remove(self) -> None:
        """Take the taps off; calling it again does nothing."""
        taps, self._taps = self._taps, {}
        for module, tap in taps.items():
            _taps.remove(module, tap)


def tap_attention(taps: Mapping[nn.Module, AttentionTap]) -> TapHandle:
    """Call a tap with each call of these modules' attention functions, until the handle that is returned is removed.

    The modules must ask transformers for their function (`interface_missing`). A call raises ForwardError if it is none of those
    that `AttentionCall` describes: it says which.
    """
    for module, tap in taps.items():
        _taps.add(module, tap)
    return TapHandle(taps)


def cannot_stream(owner: nn.Module) -> str | None:
    """Return why the attention of a module cannot be computed again with a window; None if it seems that it can."""
    return interface_missing(owner) or window_of(owner)


def interface_missing(owner: nn.Module) -> str | None:
    """Return why the attention function of a module cannot be seen; None if it can."""
    kind = type(owner)
    if "forward" in vars(owner):
        return f"the forward of its {kind.__name__} was replaced"
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if INTERFACE not in names or GET not in names:
        return f"a {kind.__name__} does not use transformers' attention interface"
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as interface

    if forward.__globals__.get(INTERFACE) is not interface:
        return f"a {kind.__name__} has attention functions of its own"
    return None


def window_of(owner: nn.Module) -> str | None:
    """Return how the attention of a module is windowed already, as text; None if each token sees all before it."""
    config = getattr(owner, "config", None)
    types, layer = getattr(config, "layer_types", None), getattr(owner, "layer_idx", None)
    if isinstance(types, list | tuple) and isinstance(layer, int) and 0 <= layer < len(types):
        return None if types[layer] in FULL else f"its layer is one of {types[layer]}"
    if getattr(owner, "is_sliding", None) is False:
        return None
    for name in WINDOWS:
        for holder in (owner, config) if name == "sliding_window" else (owner,):
            size = getattr(holder, name, None)
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return f"its {name} is {size}"
    return None


def _call_of(
    module: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionCall:
    """Return the call with these arguments. Raises ForwardError if it is of another kind."""
    given = (
        dict(zip(("query", "key", "value", "attention_mask", "scaling", "dropout"), args, strict=False))
        | kwargs
    )
    query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
    mask = given.pop("attention_mask", None)
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        _refuse(module, "is not causal")
    if given.get("dropout"):
        _refuse(module, "has dropout: call model.eval()")
    if given.get("sliding_window") is not None:
        _refuse(module, f"is windowed already (sliding_window {given['sliding_window']})")
    if key.shape[2] != query.shape[2]:
        _refuse(
            module,
            f"has {key.shape[2]} keys for {query.shape[2]} tokens: a cache must be empty (use_cache=False)",
        )
    if output.shape[:3] != (query.shape[0], query.shape[2], query.shape[1]):
        _refuse(module, f"gives {list(output.shape)} for queries {list(query.shape)}")
    unknown = [name for name, value in given.items() if value is not None and name not in KNOWN]
    if unknown:
        _refuse(module, f"is given {unknown[0]}, whose meaning is not known")
    sinks = given.get("s_aux")
    if sinks is None and isinstance(getattr(module, "sinks", None), Tensor):
        _refuse(module, "has learned sinks that its function is not given")
    scaling = given.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return AttentionCall(module, query, key, value, mask, float(scaling), given.get("softcap"), sinks)


def _refuse(module: nn.Module, why: str) -> None:
    raise ForwardError(f"the attention{of_layer(module)} {why}: it cannot be streamed")


def of_layer(module: nn.Module) -> str:
    """Describe an attention module, for messages."""
    layer = getattr(module, "layer_idx", None)
    return ("" if layer is None else f" of layer {layer}") + f" ({type(module).__name__})"
