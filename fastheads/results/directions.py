"""Directions of the residual stream: given as numbers, in a file, or as tokens of the model's vocabulary."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastheads.errors import DataError, OptionError, one_line
from fastheads.models.sites import HeadSite, decoder_of
from fastheads.models.weight_formats import is_dtensor
from fastheads.models.weights import dense_weight

# Names of a decoder's norm after its last layer.
FINAL_NORMS = ("norm", "ln_f", "norm_f", "final_norm", "final_layer_norm", "final_layernorm")

OTHERWISE = "pass the directions as a tensor [n, hidden_size]"


def directions_of(
    directions: Tensor | Sequence[int] | str | os.PathLike[str], model: nn.Module, sites: Sequence[HeadSite]
) -> Tensor:
    """Return the directions, float64 `[n, hidden_size]`; `HeadProfile.project` says of what, and what is raised."""
    if isinstance(directions, str | os.PathLike):
        return _checked(_read(Path(directions)), str(directions), DataError)
    try:
        given = torch.as_tensor(directions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"directions must be a tensor [n, hidden_size], token ids, or a path: {one_line(error, 100)}"
        ) from None
    if given.is_floating_point():
        return _checked(given, "directions", OptionError)
    if given.dtype == torch.bool or given.is_complex() or given.dim() != 1 or given.numel() == 0:
        raise OptionError(
            f"directions must be floating point [n, hidden_size] or token ids [n], not {given.dtype} {list(given.shape)}"
        )
    return _of_tokens(given.tolist(), model, sites)


def _read(path: Path) -> Tensor:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise DataError(f"{path} must hold one tensor [n, hidden_size], not {len(names)} tensors")
            return file.get_tensor(names[0])  # type: ignore[no-any-return]
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no safetensors file: {one_line(error, 200)}") from error


def _checked(given: Tensor, what: str, kind: type[OptionError] | type[DataError]) -> Tensor:
    if not given.is_floating_point() or given.dim() != 2 or 0 in given.shape:
        raise kind(f"{what} must hold floating point [n, hidden_size], not {given.dtype} {list(given.shape)}")
    if not bool(given.isfinite().all()):
        raise kind(f"{what} must be finite")
    return given.detach().to("cpu").double()


@torch.no_grad()
def _of_tokens(ids: list[int], model: nn.Module, sites: Sequence[HeadSite]) -> Tensor:
    """Return the rows of the unembedding times the final norm's gain, centred if it is a LayerNorm, `[n, hidden_size]`."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Module):
        raise OptionError(f"{type(model).__name__} has no unembedding for token ids: {OTHERWISE}")
    norm = _final_norm(model, head, sites)
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        raise OptionError(f"the unembedding of {type(model).__name__} is no linear layer: {OTHERWISE}")
    name = next((name for name, module in model.named_modules() if module is head), "the unembedding")
    rows = dense_weight(HeadSite(name, 0, 1, width, head))
    wrong = [number for number in ids if not 0 <= number < rows.shape[0]]
    if wrong:
        raise OptionError(f"token ids must be from 0 to {rows.shape[0] - 1}, not {wrong[0]}")
    gain, centred = _gain(norm, width)
    found = rows[ids].cpu().double() * gain
    return found - found.mean(-1, keepdim=True) if centred else found


def _final_norm(model: nn.Module, head: nn.Module, sites: Sequence[HeadSite]) -> nn.Module:
    """Return the norm that is all that lies between the last layer and the unembedding. Raises OptionError if that is unknown."""
    decoder = decoder_of(model)
    norms = [decoder._modules[name] for name in FINAL_NORMS if decoder._modules.get(name) is not None]
    if len(norms) != 1:
        raise OptionError(f"the final norm of {type(decoder).__name__} is not known: {OTHERWISE}")
    norm = norms[0]
    assert norm is not None

    projections = {id(site.module) for site in sites}

    def acts_before(name: str, child: nn.Module) -> bool:
        if isinstance(child, nn.Embedding) or ("emb" in name and "unemb" not in name):
            return True
        return any(id(module) in projections for module in child.modules())  # the layers

    def check(owner: nn.Module, *known: nn.Module) -> None:
        for name, child in owner.named_children():
            if any(child is one for one in known) or acts_before(name, child):
                continue
            if next(child.parameters(), None) is not None and not any(m is decoder for m in child.modules()):
                raise OptionError(
                    f"what {type(owner).__name__} does with its {name} is not known, which may lie between the last layer "
                    f"and the unembedding: {OTHERWISE}"
                )

    owner = next((m for m in model.modules() if any(child is head for child in m.children())), model)
    check(decoder, norm, head)
    check(owner, head, decoder)
    return norm


def _gain(norm: Any, width: int) -> tuple[Tensor, bool]:
    """Return the gain of an RMS norm or a LayerNorm, float64 `[width]`, and True for the latter; found from its outputs.

    Raises OptionError if it is neither.
    """
    kind = type(norm).__name__
    if any(is_dtensor(p) or p.device.type == "meta" for p in norm.parameters()):
        raise OptionError(f"the final norm ({kind}) is offloaded or split over ranks: {OTHERWISE}")
    plain = copy.deepcopy(norm).cpu().double()
    place = torch.arange(width, dtype=torch.float64, device="cpu")
    # Far from 0 and from their means, and so large that no epsilon counts.
    probes = [1e3 * (1 + 2 * ((place + shift) % 2) + place / (4 * width)) for shift in (0, 1)]
    try:
        bias, *outputs = (
            type(norm).forward(plain, x.view(1, 1, -1)).double().flatten()
            for x in (torch.zeros_like(place), *probes)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise OptionError(
            f"the final norm ({kind}) cannot be run: {one_line(error, 100)}; {OTHERWISE}"
        ) from None
    for centred in (False, True):
        shifted = [x - x.mean() if centred else x for x in probes]
        first, second = (
            (y - bias) * x.square().mean().sqrt() / x for x, y in zip(shifted, outputs, strict=True)
        )
        if first.shape == (width,) and torch.allclose(
            first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max())
        ):
            return first, centred
    raise OptionError(f"the final norm ({kind}) is neither an RMS norm nor a LayerNorm: {OTHERWISE}")
