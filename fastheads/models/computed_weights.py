"""Read weights that a module computes in each forward, without changing the model.

Computing a weight may advance a power iteration, count calls or draw random numbers. Then reading it changes the model, and the
weight read is not the one that acts: such weights are refused.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fastheads.models.weight_formats import NotDenseError, Parts, WeightFormat, qualified_name

PARAMETRIZATIONS = "torch.nn.utils.parametrizations"
# Parametrizations known to depend on their parameters and buffers alone; others are tested.
PURE = (
    f"{PARAMETRIZATIONS}._WeightNorm",
    f"{PARAMETRIZATIONS}._Orthogonal",
    f"{PARAMETRIZATIONS}._SpectralNorm",
)
POWER_ITERATION = f"{PARAMETRIZATIONS}._SpectralNorm"  # advances in training

REMEDY = "model.eval(), or make it an ordinary one (torch.nn.utils.parametrize.remove_parametrizations)"


def format_of_computed(module: Any) -> WeightFormat:
    """Return the format of a weight that is no plain parameter: set by a hook, parametrized, or a property."""
    if "weight" in vars(module):
        return _format_of_hooked(module)
    lists = module._modules.get("parametrizations")
    if lists is not None and "weight" in lists:
        return WeightFormat(
            _read_parametrized, _parts_reader(module, attributes=not _is_pure(lists["weight"]))
        )
    if "weight" in module._parameters or hasattr(type(module), "weight"):
        return WeightFormat(_read_attribute, _parts_reader(module, attributes=True))
    raise NotDenseError("has no weight: it was removed, or FSDP1 keeps it")


def is_shadowed(module: nn.Module) -> bool:
    """True if `module.weight` is, or may be, something else than the parameter of that name."""
    kind: Any = type(module)
    return (
        "weight" in vars(module)
        or hasattr(kind, "weight")
        or kind.__getattr__ is not nn.Module.__getattr__
        or kind.__getattribute__ is not nn.Module.__getattribute__
    )


# ---------------------------------------------------------------- prune, and other hooks that set the weight


def _format_of_hooked(module: Any) -> WeightFormat:
    pruning = [hook for hook in module._forward_pre_hooks.values() if _is_pruning(hook)]
    if len(pruning) == 1 and "weight_orig" in module._parameters and "weight_mask" in module._buffers:
        return WeightFormat(
            lambda m: (m.weight_orig * m.weight_mask.to(m.weight_orig.dtype)).detach(),
            lambda m: (m._parameters.get("weight_orig"), m._buffers.get("weight_mask")),
        )
    raise NotDenseError(
        "has a weight that is no parameter: a hook makes it in each forward, as torch.nn.utils.weight_norm does (remove it, or "
        "use that of torch.nn.utils.parametrizations), or FSDP1 keeps it"
    )


def _is_pruning(hook: Any) -> bool:
    """True for torch's pruning methods, which multiply by their mask."""
    base = prune.BasePruningMethod
    return (
        isinstance(hook, base)
        and getattr(hook, "_tensor_name", None) == "weight"
        and type(hook).__call__ is base.__call__
        and type(hook).apply_mask is base.apply_mask
    )


# ---------------------------------------------------------------- parametrizations, and properties


def _read_parametrized(module: Any) -> Tensor:
    cached = parametrize._cache.get((id(module), "weight")) if parametrize._cache_enabled else None
    if cached is not None:
        return cached.detach()
    compute = (
        module.parametrizations.weight
    )  # module.weight would fill the cache with a tensor without gradient
    for part in compute:
        if qualified_name(type(part)) == POWER_ITERATION and part.training and hasattr(part, "_u"):
            raise NotDenseError(
                f"has a weight with spectral_norm in training mode, where reading it changes it: {REMEDY}"
            )
    if not _is_pure(compute):
        return read_without_trace(module, compute, _kinds(compute))
    with _default_modes(module):
        return compute().detach()  # type: ignore[no-any-return]


@contextmanager
def _default_modes(module: nn.Module) -> Iterator[None]:
    """Turn off gradients, inference mode and autocast, so that results do not depend on the caller's modes."""
    first = next(module.parameters(), None)
    device = "cpu" if first is None or first.device.type == "meta" else first.device.type
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _read_attribute(module: Any) -> Tensor:
    def compute() -> Any:
        return module.weight

    return read_without_trace(module, compute, f"a property of {type(module).__name__}")


def _is_pure(parts: nn.Module) -> bool:
    """True if all parametrizations of a list are in PURE, without hooks or replaced forwards."""
    return all(
        not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        for part in parts.modules()
    ) and all(qualified_name(type(part)) in PURE for part in parts.children())


def _kinds(parts: nn.Module) -> str:
    return ", ".join(type(part).__name__ for part in parts.children())


def _parts_reader(module: nn.Module, *, attributes: bool) -> Callable[[nn.Module], Parts]:
    """Return a function that returns all that the module's weight may depend on.

    These are tensors, modes and children of the module and its submodules, with `attributes` also plain attributes; and the state
    of parametrize's cache, since a cached weight may be older than its tensors.
    """
    # Listed once, since that takes most of the time; a new submodule shows among the children.
    inner = list(module.modules())
    tables = [(m, m._parameters, m._buffers, m._modules) for m in inner]

    def parts(_: nn.Module) -> Parts:
        found = [(m.training, *p.values(), *b.values(), *c.values()) for m, p, b, c in tables]
        return (parametrize._cache_enabled > 0, *found, *(map(_attributes, inner) if attributes else ()))

    return parts


def _attributes(module: nn.Module) -> Parts:
    plain = (bool, int, float, str, Tensor)
    return tuple(
        [
            value
            for name, value in vars(module).items()
            if isinstance(value, plain) and not name.startswith("_fastheads")
        ]
    )


# ---------------------------------------------------------------- without a trace


def read_without_trace(module: nn.Module, compute: Callable[[], Any], by: str) -> Tensor:
    """Return the weight that `compute` gives, and restore `module` to its state before. `by` names what computes it.

    Raises NotDenseError if computing changes the module, or if two calls do not give the same bits. Waits for the device.
    """
    hint = f"reading it would change the model, or give another weight than the one that acts: {REMEDY}"
    with _default_modes(module), isolated(module) as changes:
        first = compute()
        if not isinstance(first, Tensor):
            raise NotDenseError(f"has a weight that is no tensor, made by {by}")
        weight = first.detach().clone()
        what = changes()
        again = compute()
        same = isinstance(again, Tensor) and _same(again, weight)
    if what is not None:
        raise NotDenseError(f"has a weight made by {by}, which {what} as it does: {hint}")
    if not same:
        raise NotDenseError(f"has a weight made by {by}, which differs each time: {hint}")
    return weight


@contextmanager
def isolated(*modules: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Run the block on copies of the modules' tensors and plain containers; restore modules and random states afterwards.

    Yields a function that describes what the block has changed so far; None: nothing.
    """
    owners = list({id(inner): inner for module in modules for inner in module.modules()}.values())
    saved = [_ModuleState(owner) for owner in owners]
    draws = _RandomStates(saved)

    def changes() -> str | None:
        if draws.moved():
            return "draws random numbers"
        changed = [name for state in saved for name in state.changed()]
        return f"changes {', '.join(changed[:3])}" if changed else None

    copies: dict[int, Any] = {}
    try:
        for state in saved:
            state.put_copies(copies)
        yield changes
    finally:
        for state in saved:
            state.restore()
        draws.restore()


class _ModuleState:
    """The attributes, parameters, buffers and children of one module."""

    _TABLES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self.before = dict(self._attributes)
        self._tables = {name: self._attributes[name] for name in self._TABLES}
        self._contents = {name: dict(table) for name, table in self._tables.items()}
        self._given: dict[str, Any] = {}

    def put_copies(self, copies: dict[int, Any]) -> None:
        for name in ("_parameters", "_buffers"):
            table = self._tables[name]
            for key, tensor in self._contents[name].items():
                table[key] = _copy(tensor, copies)
        for name, value in self.before.items():
            if name not in self._TABLES:
                self._attributes[name] = _copy(value, copies)
        self._given = dict(self._attributes)

    def changed(self) -> list[str]:
        """Return the names of what has changed."""
        found = []
        for name, before in self._contents.items():
            table = self._attributes.get(name)
            if table is not self._tables[name] or table.keys() != before.keys():
                found.append(name)
                continue
            found += [key for key, value in before.items() if not _same(table[key], value)]
        found += [name for name in self._attributes if name not in self.before]
        for name, value in self.before.items():
            if name not in self._TABLES and not (
                name in self._attributes and _same(self._attributes[name], value)
            ):
                found.append(name)
        return found

    def restore(self) -> None:
        self._attributes.clear()
        self._attributes.update(self.before)
        for name, table in self._tables.items():
            table.clear()
            table.update(self._contents[name])


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    """Copy a tensor or a plain container, once each (`copies` is the memo); return anything else itself."""
    if id(value) in copies:
        return copies[id(value)]
    copy = value
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        copy = nn.Parameter(copy, requires_grad=value.requires_grad) if type(value) is nn.Parameter else copy
    elif type(value) in (list, set, tuple):
        copy = type(value)(_copy(item, copies) for item in value)
    elif type(value) is dict:
        copy = {key: _copy(item, copies) for key, item in value.items()}
    copies[id(value)] = copy
    return copy


def _same(value: Any, before: Any) -> bool:
    """True if both are equal, bit for bit."""
    if value is before:
        return True
    if isinstance(value, Tensor) and isinstance(before, Tensor):
        alike = (value.shape, value.dtype, value.device) == (before.shape, before.dtype, before.device)
        if not alike or value.device.type == "meta":
            return alike
        value, before = value.detach(), before.detach()
        if torch.equal(value, before):
            return True
        return value.is_floating_point() and bool(
            ((value == before) | (value.isnan() & before.isnan())).all()
        )
    if type(value) is not type(before):
        return False
    if isinstance(value, list | tuple):
        return len(value) == len(before) and all(map(_same, value, before))
    if isinstance(value, dict):
        return list(value) == list(before) and all(_same(value[key], before[key]) for key in value)
    if isinstance(value, bool | int | float | complex | str | bytes | set | frozenset):
        return bool(value == before)
    return False


class _RandomStates:
    """The random states of torch on each device in use, of generators in the modules, of Python and of NumPy."""

    def __init__(self, saved: Iterable[_ModuleState]) -> None:
        numpy: Any = sys.modules.get("numpy")
        self._ways: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
        ]
        if numpy is not None:
            self._ways.append((numpy.random.get_state, numpy.random.set_state))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._ways.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        if torch.backends.mps.is_available():
            self._ways.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
        for state in saved:
            for value in state.before.values():
                if isinstance(value, torch.Generator):
                    self._ways.append((value.get_state, value.set_state))
        self._before = [get() for get, _ in self._ways]

    def moved(self) -> bool:
        return any(
            not _same_state(get(), before) for (get, _), before in zip(self._ways, self._before, strict=True)
        )

    def restore(self) -> None:
        for (get, put), before in zip(self._ways, self._before, strict=True):
            if not _same_state(get(), before):
                put(before)


def _same_state(state: Any, before: Any) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, before)
    if isinstance(state, list | tuple):
        return all(map(_same_state, state, before))
    return bool((state == before).all()) if hasattr(state, "all") else bool(state == before)
