"""The self-check of the sites, in the first forward that runs them.

Two claims carry every number: that the projection adds up its heads (W x + bias is what it gives), and that the heads lie in its
input one after another, as wide as the site says. The first is checked against the projection's own output, which any division
into heads sums up to. The second is checked against the output of transformers' attention interface; of models that do not use
it, against the number of heads that torch's attention or softmax was called with.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastheads.errors import VerificationError
from fastheads.models.geometry import heads_per_unit
from fastheads.models.sites import HeadSite
from fastheads.models.weights import dense_weight
from fastheads.stats.numerics import exact_arithmetic

# Tokens of a batch that are checked: the product is taken in float64, whatever the model's size.
CHECKED_TOKENS = 256
# Errors of a product, in units of rounding: what libraries do beyond rounding each product once.
SLACK = 2.0


@dataclass(frozen=True)
class Finding:
    """The findings of one site's first run."""

    error: float  # ‖output - (sum of heads + bias)‖ / ‖output‖ over the tokens checked; NaN where all were NaN or 0
    geometry: str  # one of GEOMETRY


EXACT, CHANGED, UNSEEN = "exact", "changed", "unseen"
GEOMETRY = {
    EXACT: "the projection is given the very heads that transformers' attention interface returned",
    CHANGED: "it is given as many heads, which a gate or a norm changed on the way",
    UNSEEN: "the model does not use that interface, so that its heads were not compared, or by their number alone",
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
        # The shape of torch's last attention `[batch, heads, seq, head_dim]`, or of its weights `[batch, heads, seq, keys]` or
        # `[batch * heads, seq, keys]`.
        self._computed: tuple[int, ...] | None = None
        self._handles: dict[str, list[Any]] = {
            site.name: [
                # before hooks that change the output
                site.module.register_forward_hook(self._hook(site, _units_of(model, site)), prepend=True),
                _layer_of(model, site).register_forward_pre_hook(self._forget),
            ]
            for site in sites
        }

    def watch(self) -> None:
        """Listen to attention functions while a forward runs."""
        if self._handles and self not in _watchers:
            _watchers.append(self)
            _listen()

    def unwatch(self) -> None:
        """Stop listening, when the forward has ended or failed."""
        self._attended = self._computed = None
        if self in _watchers:
            _watchers.remove(self)
            _listen()

    def close(self) -> None:
        """Take the hooks off the model."""
        self.unwatch()
        for name in list(self._handles):
            self._take_off(name)

    def unchecked(self) -> list[str]:
        """Return the names of the sites that have not been checked."""
        return [name for name in self._sites if name not in self.findings]

    def attended(self, owner: nn.Module, output: Any) -> None:
        """Note that the attention interface returned `output` `[batch, seq, heads, head_dim]` to the module `owner`."""
        if id(owner) in self._modules and isinstance(output, Tensor) and output.dim() == 4:
            self._attended = owner, output

    def computed(self, shape: tuple[int, ...]) -> None:
        """Note the shape of an output of torch's attention or softmax."""
        if len(shape) in (3, 4):
            self._computed = shape

    def _take_off(self, name: str) -> None:
        for handle in self._handles.pop(name):
            handle.remove()

    def _forget(self, *_: Any) -> None:
        """Forget, at the start of a layer, the attention outputs of earlier layers."""
        if not torch.compiler.is_compiling():
            self._attended = self._computed = None

    def _hook(self, site: HeadSite, units: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            attended, computed = self._attended, self._computed
            self._attended = self._computed = None
            if module is not site.module or self not in _watchers or torch.compiler.is_compiling():
                return
            x = args[0].detach()
            if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph cannot wait for a verdict
                return
            with torch.no_grad():
                geometry = _geometry(site, x, attended)
                if attended is None and computed is not None:
                    _check_number(site, units, x, computed)
                error = _sum_error(site, x, output.detach())
            self.findings[site.name] = Finding(error, geometry)
            self._take_off(site.name)

        return hook


def _geometry(site: HeadSite, x: Tensor, attended: tuple[nn.Module, Tensor] | None) -> str:
    """Compare a projection's input `x` `[batch, seq, heads * head_dim]` to the attention's output; returns one of GEOMETRY."""
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


def _check_number(site: HeadSite, units: int, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise VerificationError if `shape` is that of attention over the tokens of `x` with other numbers of heads than the site.
    `units`: how many of the attention's heads make one of the site's.
    """
    batch, seq = x.shape[0], x.shape[-2]
    if x.dim() != 3 or shape[-2] != seq:
        return
    heads, rest = (shape[1], shape[0] - batch) if len(shape) == 4 else divmod(shape[0], batch)
    if rest or heads == 1 or x.shape[-1] % heads:  # a router's softmax, say
        return
    if heads != site.num_heads * units:
        raise VerificationError(
            f"{site.name}: the attention runs with {heads} heads, but the site has {site.num_heads} of {site.head_dim}"
        )


def _units_of(model: nn.Module, site: HeadSite) -> int:
    """Return how many of the attention's heads make one of the site's."""
    parts = site.name.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return max(heads_per_unit(module) for module in around)


def _layer_of(model: nn.Module, site: HeadSite) -> nn.Module:
    """Return the layer of the projection: the innermost item of a module list around it; its parent if there is none."""
    parts = site.name.split(".")[:-1]
    numbered = [depth for depth, part in enumerate(parts, 1) if part.isdigit()]
    return model.get_submodule(".".join(parts[: numbered[-1]] if numbered else parts))


def _sum_error(site: HeadSite, x: Tensor, output: Tensor) -> float:
    """Return the relative error of heads + bias to the projection's `output` `[batch, seq, out]`. Raises VerificationError."""
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
    """Bound the rounding error of a product, of its terms and their sum, relative to the root of the squared terms."""
    parts = max(torch.finfo(x.dtype).eps, torch.finfo(output.dtype).eps)
    sums = torch.finfo(torch.promote_types(output.dtype, torch.float32)).eps
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    matmul = backends.mkldnn.matmul if x.device.type == "cpu" else backends.cuda.matmul
    if output.dtype == torch.float32 and {matmul.fp32_precision, backends.fp32_precision} & {"tf32", "bf16"}:
        parts = torch.finfo(torch.bfloat16).eps
    return SLACK * (parts + math.sqrt(x.shape[-1]) * sums)


_watchers: list[SelfCheck] = []
# What is replaced while anyone watches: (owner, name, its own, or None where it inherits that).
_own: list[tuple[Any, str, Any]] = []

# Where torch's attention and softmax are called.
TORCH_ATTENTION: tuple[tuple[Any, str], ...] = (
    (F, "scaled_dot_product_attention"),
    (F, "softmax"),
    (torch, "softmax"),
    (Tensor, "softmax"),
)


def _listen() -> None:
    """Wrap the attention functions while a self-check watches: those of transformers' `AttentionInterface.get_interface` report
    their outputs, torch's attention and softmax the shapes of theirs.
    """
    from transformers.modeling_utils import AttentionInterface

    if not _watchers:
        while _own:
            owner, name, own = _own.pop()
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
    elif not _own:
        for owner, name in TORCH_ATTENTION:
            _replace(owner, name, _telling_shape(getattr(owner, name)))
        interface: Any = AttentionInterface  # the class: Doge has an instance of its own
        if hasattr(interface, "get_interface"):  # early releases have none
            get = interface.get_interface
            _replace(interface, "get_interface", lambda *args, **kwargs: _telling(get(*args, **kwargs)))


def _replace(owner: Any, name: str, other: Any) -> None:
    _own.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, other)


def _telling(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_and_tell(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = attend(module, *args, **kwargs)
        for check in _watchers:
            check.attended(module, result[0])
        return result

    return attend_and_tell


def _telling_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def compute_and_tell(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling() and isinstance(result, Tensor):
            for check in _watchers:
                check.computed(tuple(result.shape))
        return result

    return compute_and_tell
