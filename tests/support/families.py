"""Every causal-LM family of the installed transformers as a tiny random model on the CPU, from its configuration alone.

A family is a key of transformers' MODEL_FOR_CAUSAL_LM_MAPPING. Its own default configuration is shrunk by one table, and what
that does not reach is in a table of the family's own. Nothing is downloaded.
"""

import importlib.util
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The tables below name families of this release; older ones lack some.
WRITTEN_FOR = (5, 23)
RELEASE = tuple(map(int, tf.__version__.split(".")[:2]))

VOCAB, LAYERS, HEADS = 101, 4, 4

# What settings become, wherever a default configuration or a part of it has them. Heads are wider than hidden_size / num_heads.
SMALL: dict[str, Any] = {
    setting: value
    for settings, value in {
        "hidden_size d_model n_embd dim embedding_size emb_dim dim_model embedding_dim input_embedding_size "
        "output_embedding_size attention_hidden_size ple_embed_dim projector_input_dim projector_output_dim vision_output_dim "
        "out_hidden_size hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size": 64,
        "intermediate_size ffn_dim d_ff dim_ff ffn_hidden_size feed_forward_size decoder_ffn_dim encoder_ffn_dim "
        "intermediate_size_mlp mlp_dim": 96,
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size hc_lowrank": 32,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
        "num_blocks depth": LAYERS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads": HEADS,
        "num_key_value_heads kv_n_heads": 2,
        "head_dim dim_head attention_head_dim": 24,
        "vocab_size vocab_size_per_layer_input": VOCAB,
        "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions": 64,
        # latent attention: heads of queries, keys and values differ in width
        "q_lora_rank kv_lora_rank": 32,
        "qk_rope_head_dim laurel_rank index_head_dim": 8,
        "qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim hidden_size_per_layer_input": 16,
        "v_head_dim": 12,
        "num_experts num_local_experts n_routed_experts zero_expert_num index_topk linear_num_value_heads linear_num_heads": 4,
        "num_experts_per_tok num_experts_per_token moe_topk index_n_heads linear_num_key_heads": 2,
        "n_group topk_group num_expert_group": 1,
        "image_size": 32,
        "patch_size": 16,
        "use_mamba_kernels": False,
    }.items()
    for setting in settings.split()
}

# Settings of families that SMALL does not reach, or breaks. Several give layers heads of different numbers or widths.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1, 3], mamba_d_head=32, mamba_n_heads=4, mamba_d_state=16),
    "blt": dict(encoder_hash_byte_group_vocab=50),
    "codegen": dict(rotary_dim=8),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    ),
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.ffn_hidden_size": 64,
    },
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "dots3_note_text": dict(
        **dict(head_dim=24, swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_q_lora_rank=32),
        **dict(swa_kv_lora_rank=32, swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=12),
    ),
    "falcon_h1": dict(
        mamba_d_state=16, mamba_n_heads=4, mamba_d_head=32, mamba_d_ssm=128, mamba_chunk_size=16
    ),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gemma4_text": dict(global_head_dim=48),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "gptj": dict(rotary_dim=8),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"] * 2, mamba_d_head=32, mamba_n_heads=4, mamba_d_state=16
    ),
    "helium": dict(head_dim=16),
    "inkling_text": dict(swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_head_dim=48),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(num_attention_heads_per_layer=[4, 8, 4, 8]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(head_dim=32, n_groups=1, state_size=16),
    "qwen4_exp_text": dict(
        **dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=24),
        **dict(indexer_budget=4, indexer_compress_ratio=2),
    ),
    "recurrent_gemma": dict(head_dim=16),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=128, attention_head_dim=32),
    "zamba2": dict(attention_hidden_size=128, attention_head_dim=32),
    "zaya": dict(num_experts_per_tok=1),
}
OWN["inkling2_text"] = OWN["inkling_text"]
OWN["gemma4_unified_text"] = OWN["gemma4_text"]
for _whole in ("dots3_note", "gemma4", "gemma4_unified", "qwen4_exp"):
    OWN[_whole] = {f"text_config.{name}": value for name, value in OWN[f"{_whole}_text"].items()}

# Families whose class takes a part of their configuration, and those that take several rows of ids for a row of tokens.
PART = {"musicgen": "MusicgenDecoderConfig", "musicgen_melody": "MusicgenMelodyDecoderConfig"}
ROWS = {"musicgen": 4, "musicgen_melody": 4}

# What a family does to its heads between the attention and the projection; all others hand them on as they are.
BEFORE_PROJECTION = {
    **dict.fromkeys(
        ("afmoe", "axk2", "bailing_hybrid", "beam", "dots3_note", "dots3_note_text", "hrm_text", "hy_v4"),
        "gate",
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), "gate"),
    **dict.fromkeys(("inkling2_text", "laguna", "lfm3", "qwen4_exp", "qwen4_exp_text"), "gate"),
    "bitnet": "norm over all heads",
    "diffllama": "difference of two heads, norm",
}
# Families with sites that do not run on text alone.
SKIPS = {"mllama": "cross-attention to pictures"}
# Heads of the attention that make one unit at the projection.
HEADS_PER_UNIT = {"diffllama": 2}
# Modules whose softmax attends to something else than tokens.
NOT_OVER_TOKENS = ("Inkling2BlockAttentionResidual",)  # over the outputs of earlier layers

# Families that are not profiled: the words of the refusal.
REFUSED = {
    "blt": "over bytes and over patches",
    "cpmant": "puts a prompt of its own before the tokens",
    "deepseek_v4": "in two steps",
    "jetmoe": "output projections are experts",
    "prophetnet": "n-gram streams",
    "reformer": "pads sequences to its chunks",
    "rwkv": "without heads",
    "xlnet": "no module",
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), "no softmax attention"),
}
# Families that do not run here at all: what stands against it.
_ALONE = "reads the keys and values of the model it assists"
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": _ALONE,
    "gemma4_unified_assistant": _ALONE,
}
# Families that run here from a release on, or from an earlier one: with 5.17, Qwen 4 gives NaN for rows with padding.
BUILT_FROM = {
    **{"phi4_multimodal": (5, 1), "zamba2": (5, 5)},
    **dict.fromkeys(("cohere_compass_text", "qwen4_exp", "qwen4_exp_text"), (5, 23)),
}


def why_missing(family: str) -> str | None:
    """What stands against running the family here, if something does."""
    if BUILT_FROM.get(family, (5, 0)) > RELEASE:
        return "this release cannot build or run it small"
    if "timm" in NOT_BUILT.get(family, "") and importlib.util.find_spec("timm"):
        return None
    return NOT_BUILT.get(family)


def config(family: str) -> Any:
    """The family's configuration, small. Raises whatever transformers does where it cannot be had."""
    kind = getattr(tf, PART[family]) if family in PART else tf.CONFIG_MAPPING[family]
    settings = shrunk(kind().to_dict())
    for name, value in OWN.get(family, {}).items():
        *parts, last = name.split(".")
        inner = settings
        for part in parts:
            inner = inner[part]
        inner[last] = value
    return kind(**settings)


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """What to change of a default configuration; lists by layer are cut to LAYERS, with each kind of layer in them."""
    changes: dict[str, Any] = {}
    if "vocab_size" in settings:
        changes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    depth = next(
        (settings[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if settings.get(name)),
        None,
    )
    for name, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            changes[name] = {"model_type": value["model_type"], **shrunk(value)}
        elif isinstance(value, list) and depth and len(value) == depth:
            changes[name] = (list(dict.fromkeys(value)) * LAYERS)[:LAYERS]
        elif name in SMALL:
            changes[name] = SMALL[name]
    if "kv_lora_rank" in settings:
        changes |= dict(num_key_value_heads=HEADS, head_dim=SMALL["qk_rope_head_dim"])
    return changes


def build(family: str, seed: int = 0, implementation: str | None = "eager") -> torch.nn.Module:
    """A random float32 model in evaluation mode; the same seed gives the same weights.

    `implementation` is that of the attention; None is transformers' choice.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[tf.CONFIG_MAPPING[family]]
    settings = config(family)
    if not isinstance(settings, kind.config_class):
        settings = settings.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind._from_config(settings, attn_implementation=implementation)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start: a bias that counts for a head would not show
                torch.nn.init.normal_(parameter, std=0.5)
    return model.float().eval()


def batch(family: str, mask: list[list[int]]) -> dict[str, Any]:
    """The arguments of one forward of random tokens under `mask`."""
    rows, length = len(mask), len(mask[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (rows * ROWS.get(family, 1), length), generator=generator)
    return dict(input_ids=ids, attention_mask=torch.tensor(mask), use_cache=False)
