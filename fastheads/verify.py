"""The self-check: what one forward shows about the sites, while it runs.

Two claims carry every number: that the projection adds up its heads (W x + bias is what it gives), and that the heads lie in its
input one after another, as wide as the site says. The first is checked against the projection's own output, the second against
the output of transformers' attention interface, for the models that use it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.errors import VerificationError
from fastheads.numerics import exact_arithmetic
from fastheads.sites import HeadSite, heads_per_unit
from fastheads.weights import dense_weight

# Tokens of a batch that are checked: the product is taken in float64, whatever the model's size.
CHECKED_TOKENS = 256
# Errors of a product, in units of rounding: what libraries do beyond rounding each product once.
SLACK = 2.0


@dataclass(frozen=True)
class Finding:
    """What one site's first run showed."""

    error: float  # ‖output - (sum of heads + bias)‖ / ‖output‖ over the tokens checked; NaN where all were NaN or 0
    geometry: str  # one of GEOMETRY


EXACT, CHANGED, UNSEEN = "exact", "changed", "unseen"
GEOMETRY = {
    EXACT: "the projection is given the very heads that transformers' attention interface returned",
    CHANGED: "it is given as many heads, which a gate or a norm changed on the way",
    UNSEEN: "the model does not use that interface, so that its heads were not compared",
}


class SelfCheck:
    """Checks each site the first time it runs; raises VerificationError out of the forward.

    Sites that run only in compiled code or CUDA graphs are not checked: `unchecked` names them.
    """

    def __init__(self, model: nn.Module, sites: list[HeadSite]) -> None:
        self.findings: dict[str, Finding] = {}
        self._sites = {site.name: site for site in sites}
        self._modules = {id(module) for module in model.modules()}
        self._attended: tuple[nn.Module, Tensor] | None = (
            None  # the last call of the interface, until a projection runs
        )
        self._handles: dict[str, Any] = {
            # before hooks that change the output
            site.name: site.module.register_forward_hook(self._hook(site), prepend=True)
            for site in sites
        }

    def watch(self) -> None:
        """A forward begins: listen to the attention interface."""
        if self._handles and self not in _watchers:
            _watchers.append(self)
            _listen()

    def unwatch(self) -> None:
        """The forward is over, one way or the other."""
        self._attended = None
        if self in _watchers:
            _watchers.remove(self)
            _listen()

    def close(self) -> None:
        """Take everything off the model."""
        self.unwatch()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def unchecked(self) -> list[str]:
        """The names of the sites that have not been checked."""
        return [name for name in self._sites if name not in self.findings]

    def attended(self, owner: nn.Module, output: Any) -> None:
        """The attention interface returned `output` `[batch, seq, heads, head_dim]` to the module `owner`."""
        if id(owner) in self._modules and isinstance(output, Tensor) and output.dim() == 4:
            self._attended = owner, output

    def _hook(self, site: HeadSite) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            attended, self._attended = self._attended, None
            if module is not site.module or self not in _watchers or torch.compiler.is_compiling():
                return
            x = args[0].detach()
            if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph cannot wait for a verdict
                return
            with torch.no_grad():
                geometry = _geometry(site, x, attended)
                error = _sum_error(site, x, output.detach())
            self.findings[site.name] = Finding(error, geometry)
            self._handles.pop(site.name).remove()

        return hook


def _geometry(site: HeadSite, x: Tensor, attended: tuple[nn.Module, Tensor] | None) -> str:
    """One of GEOMETRY for the projection's input `x` `[batch, seq, heads * head_dim]`."""
    if attended is None:
        return UNSEEN
    owner, output = attended
    unit = heads_per_unit(owner)
    heads, head_dim = output.shape[2] // unit, output.shape[3] * unit
    if unit == 1 and (heads, x.shape[:2]) == (site.num_heads, output.shape[:2]):
        # some kernels widen the values to the keys' width: what they add is cut off again
        given = output[..., : site.head_dim].flatten(2)
        if given.shape == x.shape and torch.equal(given.nan_to_num(), x.nan_to_num()):
            return EXACT
    if heads != site.num_heads or head_dim < site.head_dim:
        raise VerificationError(
            f"{site.name}: the attention makes {heads} heads of {head_dim}, but the site has {site.num_heads} of {site.head_dim}"
        )
    return CHANGED


def _sum_error(site: HeadSite, x: Tensor, output: Tensor) -> float:
    """The relative error of heads + bias against the projection's `output` `[batch, seq, out]`. Raises VerificationError."""
    if x.shape[-1] != site.num_heads * site.head_dim:
        raise VerificationError(
            f"{site.name}: its input is {x.shape[-1]} wide, but the site has {site.num_heads} heads of {site.head_dim}"
        )
    rows, given = x.flatten(0, -2)[:CHECKED_TOKENS], output.flatten(0, -2)[:CHECKED_TOKENS]
    if x.device.type == "mps":  # no float64 there
        rows, given = rows.cpu(), given.cpu()
    finite = rows.isfinite().all(dim=-1) & given.isfinite().all(dim=-1)  # padding may hold anything
    rows, given = rows[finite], given[finite].double()
    with exact_arithmetic(x.device.type):
        weight = dense_weight(site).to(rows.device)
        total, spread = torch.zeros_like(given), torch.zeros_like(given)
        for h in range(site.num_heads):
            columns = slice(h * site.head_dim, (h + 1) * site.head_dim)
            z, w = rows[:, columns].double(), weight[:, columns].double()
            total += z @ w.T
            spread += z.square() @ w.square().T
        bias = getattr(getattr(site.module, "base_layer", site.module), "bias", None)
        if isinstance(bias, Tensor):
            total += bias.to(rows.device).double()
    error = (given - total).norm()
    if error > _rounding(x, output) * (spread.sum() + total.square().sum()).sqrt():
        raise VerificationError(
            f"{site.name}: its heads and bias do not sum to what it gives, by {float(error / given.norm()):.1%}: the weight that "
            "is measured with is not the one that acts"
        )
    return float(error / given.norm())


def _rounding(x: Tensor, output: Tensor) -> float:
    """How far a product may be off, relative to the root of its squared terms: rounding of the parts, and of their sum."""
    parts = max(torch.finfo(x.dtype).eps, torch.finfo(output.dtype).eps)
    sums = torch.finfo(torch.promote_types(output.dtype, torch.float32)).eps
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    matmul = backends.mkldnn.matmul if x.device.type == "cpu" else backends.cuda.matmul
    if output.dtype == torch.float32 and {matmul.fp32_precision, backends.fp32_precision} & {"tf32", "bf16"}:
        parts = torch.finfo(torch.bfloat16).eps
    return SLACK * (parts + math.sqrt(x.shape[-1]) * sums)


_watchers: list[SelfCheck] = []
_own_get_interface: list[Callable[..., Any]] = []  # transformers' own, while another stands in its place


def _listen() -> None:
    """While anyone watches, transformers' `AttentionInterface.get_interface` hands out functions that tell of their outputs."""
    from transformers.modeling_utils import AttentionInterface

    interface: Any = AttentionInterface  # the class: Doge has an instance of its own
    if not _watchers and _own_get_interface:
        interface.get_interface = _own_get_interface.pop()
    elif (
        _watchers and not _own_get_interface and hasattr(interface, "get_interface")
    ):  # early releases have none
        own = interface.get_interface
        _own_get_interface.append(own)
        interface.get_interface = lambda *args, **kwargs: _telling(own(*args, **kwargs))


def _telling(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_and_tell(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = attend(module, *args, **kwargs)
        for check in _watchers:
            check.attended(module, result[0])
        return result

    return attend_and_tell
