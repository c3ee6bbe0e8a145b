"""Make a pruned copy of a model: heads' columns of the output projection zeroed, or whole KV groups cut out of the weights.

Everything that cannot be right is refused by name: weights that are not plain tensors of this model alone, projections of a
layout that is not known, classes that cannot be built with the changed configuration.
"""

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.errors import OptionError, PruningError, one_line
from fastheads.intervene.plan import PruningPlan, heads_of_groups, num_kv_groups, whole_groups
from fastheads.models.geometry import heads_per_unit
from fastheads.models.sites import HeadSite, attention_of, find_sites, unwrapped
from fastheads.models.weight_formats import is_dtensor, is_transposed
from fastheads.models.weights import is_plain
from fastheads.results.head_profile import HeadProfile

# Entries of the configuration by which classes build the output projection with a bias; some put biases elsewhere too, which
# are zero here.
BIAS_ENTRIES = ("attention_bias", "use_bias", "bias", "enable_bias")
# Names of separate query, key and value projections; and classes whose fused one holds queries, then keys, then values.
SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = {"Phi3Attention": "qkv_proj"}


def pruned_copy(model: nn.Module, plan: PruningPlan, *, profile: HeadProfile | None = None) -> Any:
    """Return a copy of `model`, of the same class, without the heads of `plan`. Weights that do not change are shared with it.

    Heads are removed by zeroing their columns of the output projection's weight, or with `plan.uniform` by cutting their KV
    groups out of the query, key, value and output projections, which changes the configuration. With mode "mean", W_h z̄_h is
    added to the output projection's bias, which the class must be able to hold.

    Args:
        model: of transformers, whole and on one device.
        plan: of this model.
        profile: for mode "mean", the profile with the heads' mean vectors.

    Raises:
        PlanError: the plan is of other weights, or names heads that the model has not.
        PruningError: the model cannot be pruned so; the message names the reason and the module.
        OptionError: mode "mean" without a profile; `uniform` with heads that are not as many whole KV groups in each layer.
        ResultsError: mode "mean", and the profile has no mean vectors of these heads.
    """
    model = unwrapped(model)
    check_prunable(model)
    chosen = plan.sites_of(model)
    sites = find_sites(model) if plan.uniform else list(chosen.values())
    _check_own_weights(model, sites)
    if plan.mode == "mean" and profile is None:
        raise OptionError("mode 'mean' needs profile=, the profile with the heads' mean vectors")
    biases = {} if plan.mode == "zero" or profile is None else profile.mean_bias(model, plan.heads)

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config: Any = copy.deepcopy(model.config)
    if plan.uniform:
        _cut(model, sites, plan, state, config)
    else:
        for layer, site in chosen.items():
            _zero(state, site, plan.by_layer[layer])
    if biases:
        config = _with_biases(model, chosen, config)
    return _built(
        model, config, state, {f"{chosen[layer].name}.bias": bias for layer, bias in biases.items()}
    )


def check_prunable(model: nn.Module) -> None:
    """Raise PruningError, naming the reason, unless `model` is one of transformers' own, whole, dense and without adapters."""
    kind = type(model).__name__
    config = getattr(model, "config", None)
    adapted = hasattr(model, "peft_config") or any(
        "base_layer" in module._modules for module in model.modules()
    )
    if adapted:
        raise PruningError(f"{kind} has adapters: merge them first, merge_and_unload()")
    if not type(model).__module__.startswith("transformers.models.") or not hasattr(model, "save_pretrained"):
        raise PruningError(
            f"{kind} of {type(model).__module__} is no model of transformers: others cannot be reloaded by it"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(quantized, "quant_method", None) or (quantized or {}).get("quant_method", "?")
        raise PruningError(
            f"{kind} is quantized ({getattr(method, 'value', method)}): prune the dense model, and quantize the result"
        )
    for name, tensor in model.state_dict().items():
        if is_dtensor(tensor):
            raise PruningError(f"{name} is split over ranks: load the whole model in one process")
        if tensor.device.type == "meta":
            raise PruningError(f"{name} is offloaded, or not loaded: load the whole model on one device")


def _check_own_weights(model: nn.Module, sites: Iterable[HeadSite]) -> None:
    """Raise PruningError unless the projections' weights are plain, and no other module has them too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}")
    for site in sites:
        _check_plain(site)
        names = owners[id(site.module.weight)]
        if len(names) > 1:
            raise PruningError(
                f"{site.name}: several modules share its weight ({', '.join(names[:3])}), so that heads are not of one layer"
            )


def _check_plain(site: HeadSite) -> None:
    if not is_plain(site) or not torch.is_floating_point(site.module.weight):  # type: ignore[arg-type]
        kind = type(site.module)
        raise PruningError(
            f"{site.name} ({kind.__name__} of {kind.__module__}) has no plain weight: quantized, adapted "
            "and computed weights cannot be pruned"
        )


# ---------------------------------------------------------------- zeroing, and biases


def _zero(state: dict[str, Tensor], site: HeadSite, heads: Iterable[int]) -> None:
    """Zero the columns of heads in the output projection's weight (the rows where it is stored [in, out])."""
    weight = state[f"{site.name}.weight"].clone()
    columns = weight.T if is_transposed(site.module) else weight
    for head in heads:
        columns[:, head * site.head_dim : (head + 1) * site.head_dim] = 0
    state[f"{site.name}.weight"] = weight


def _with_biases(model: nn.Module, chosen: dict[int, HeadSite], config: Any) -> Any:
    """Return a configuration with which the class builds the output projections with a bias: `config`, if it does already."""
    needed = [f"{site.name}.bias" for site in chosen.values()]
    if all(site.module._parameters.get("bias") is not None for site in chosen.values()):
        return config
    tried = [
        name for name in BIAS_ENTRIES if getattr(config.get_text_config(decoder=True), name, None) is False
    ]
    for name in tried:
        changed = copy.deepcopy(config)
        setattr(changed.get_text_config(decoder=True), name, True)
        if set(needed) <= _skeleton(model, changed, "meta").state_dict().keys():
            return changed
    raise PruningError(
        f"{type(model).__name__} cannot hold the heads' means: its output projections ({needed[0].removesuffix('.bias')}) have "
        "no bias, and its configuration cannot give them one: use mode zero"
    )


# ---------------------------------------------------------------- cutting KV groups


def _cut(
    model: nn.Module, sites: list[HeadSite], plan: PruningPlan, state: dict[str, Tensor], config: Any
) -> None:
    """Cut the plan's KV groups out of the weights in `state`, and change `config` accordingly."""
    for site in sites:
        _projections(model, site)  # of a known layout, before anything else is said of groups
    groups = whole_groups(model, sites, plan.heads)
    if sorted(heads_of_groups(model, sites, groups)) != list(plan.heads):
        raise OptionError("uniform: the heads are not whole KV groups, with all query heads of each")
    kept: dict[int, list[int]] = {}
    for site in sites:
        cut = {group for layer, group in groups if layer == site.layer}
        kept[site.layer] = [group for group in range(num_kv_groups(model, site)) if group not in cut]
    counts = {len(numbers) for numbers in kept.values()}
    if len(counts) > 1 or len({(site.num_heads, site.head_dim) for site in sites}) > 1:
        raise OptionError(
            "uniform: as many KV groups must be cut in each layer, and the layers must have heads alike"
        )
    if counts == {0}:
        raise OptionError("uniform: no KV group is left")
    if len(kept) < len(sites):
        raise PruningError("uniform: some layers have several attentions")
    for site in sites:
        _cut_site(model, site, kept[site.layer], state)
    text, site = config.get_text_config(decoder=True), sites[0]
    size = site.num_heads // num_kv_groups(model, site)
    number = counts.pop()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if not isinstance(getattr(text, name, None), int):
            raise PruningError(
                f"uniform: {type(config).__name__} has no {name}, so that fewer KV groups cannot be built"
            )
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = number * size, number, site.head_dim


def _cut_site(model: nn.Module, site: HeadSite, kept: list[int], state: dict[str, Tensor]) -> None:
    """Cut all but the KV groups `kept` out of one attention's weights."""
    path, attention, names = _projections(model, site)
    groups = num_kv_groups(model, site)
    size = site.num_heads // groups
    heads = [group * size + n for group in kept for n in range(size)]
    width = site.head_dim
    # By projection: its parts, each as units of `width` outputs and the units that stay.
    queries, keys = (site.num_heads, heads), (groups, kept)
    together = [queries, keys, keys]
    parts = (
        {names[0]: together} if len(names) == 1 else dict(zip(names, ([of] for of in together), strict=True))
    )
    for name, of in parts.items():
        module: Any = attention._modules[name]
        _check_own_weights(model, [HeadSite(f"{path}.{name}", site.layer, 1, module.in_features, module)])
        units = sum(number for number, _ in of)
        if module.weight.shape[0] != units * width:
            raise PruningError(
                f"uniform: {path}.{name} has {module.weight.shape[0]} outputs where {units} heads of {width} are expected: "
                "its layout is not known, prune it without uniform"
            )
        rows, start = [], 0
        for number, stay in of:
            rows += [start + unit * width + n for unit in stay for n in range(width)]
            start += number * width
        index = torch.tensor(rows, device=module.weight.device)
        for entry in ("weight", "bias"):
            if f"{path}.{name}.{entry}" in state:
                state[f"{path}.{name}.{entry}"] = state[f"{path}.{name}.{entry}"].index_select(0, index)
    weight = state[f"{site.name}.weight"]
    index = torch.tensor([head * width + n for head in heads for n in range(width)], device=weight.device)
    state[f"{site.name}.weight"] = weight.index_select(1, index)


def _projections(model: nn.Module, site: HeadSite) -> tuple[str, nn.Module, tuple[str, ...]]:
    """Return the path and the module of the attention, and the names of its query, key and value projections.

    Raises PruningError, naming the attention, if their layout is not known.
    """
    attention = attention_of(model, site)
    kind = type(attention).__name__
    path = next(name for name, module in model.named_modules() if module is attention)
    fused = FUSED.get(kind)
    names = SEPARATE if fused is None else (fused,)
    missing = [name for name in names if not isinstance(attention._modules.get(name), nn.Linear)]
    if missing or heads_per_unit(attention) > 1 or is_transposed(site.module):
        raise PruningError(
            f"uniform: {path} ({kind}) has no separate {', '.join(SEPARATE)} of torch.nn.Linear, nor a fused projection of a "
            "known layout: prune it without uniform"
        )
    return path, attention, names


# ---------------------------------------------------------------- the copy


def _built(model: Any, config: Any, state: dict[str, Tensor], biases: dict[str, Tensor]) -> Any:
    """Build the class of `model` with `config` and the weights `state`, the `biases` added to those of the same name."""
    copied = _skeleton(model, config, None)
    expected = copied.state_dict()
    strange = sorted(state.keys() - expected.keys())
    for name, tensor in expected.items():
        if name not in state:
            if not name.endswith(".bias"):
                strange.append(name)
                continue
            state[name] = torch.zeros(tensor.shape, dtype=model.dtype, device=model.device)
        elif state[name].shape != tensor.shape:
            raise PruningError(
                f"{type(model).__name__} with {_heads_of(config)} has {name} {list(tensor.shape)} where the pruned weight is "
                f"{list(state[name].shape)}: it cannot be cut"
            )
    if strange:
        raise PruningError(f"{type(model).__name__} built again has other weights: {', '.join(strange[:3])}")
    for name, bias in biases.items():
        state[name] = (state[name].double() + bias.to(state[name].device).double()).to(state[name].dtype)
    copied.load_state_dict(state, strict=True, assign=True)
    copied.tie_weights()
    copied.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied.to(model.device).eval()


def _skeleton(model: Any, config: Any, device: str | None) -> Any:
    """Build the class of `model` with `config` and uninitialized weights. Raises PruningError where the class refuses."""
    from transformers.initialization import no_init_weights

    try:
        # Through a dictionary, as from a file: that runs the class's checks of its configuration.
        config = type(config).from_dict(config.to_dict())
        with no_init_weights(), nullcontext() if device is None else torch.device(device):
            return type(model)._from_config(config, attn_implementation=model.config._attn_implementation)
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} cannot be built with {_heads_of(config)}: {one_line(error, 200)}"
        ) from error


def _heads_of(config: Any) -> str:
    text = config.get_text_config(decoder=True)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return ", ".join(
        f"{name} {getattr(text, name)}" for name in names if getattr(text, name, None) is not None
    )
