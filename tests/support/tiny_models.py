"""Small random models of the families, built from their configurations."""

import torch
import transformers as tf

from fastheads.models.weight_formats import LINEAR_FORWARDS

VOCAB = 101
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# family -> (config class, what differs from COMMON); head_dim 24 is not hidden_size / num_attention_heads.
FAMILIES = {
    "llama": ("LlamaConfig", dict(head_dim=24)),
    "llama-bias": ("LlamaConfig", dict(attention_bias=True)),
    "mistral": ("MistralConfig", dict(head_dim=24, sliding_window=None)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=24)),
    "gemma": ("GemmaConfig", dict(head_dim=24)),
    "gemma2": ("Gemma2Config", dict(head_dim=24, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=24)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
    "granite": ("GraniteConfig", {}),
    "gpt-oss": ("GptOssConfig", dict(head_dim=24, num_local_experts=4, num_experts_per_tok=2)),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
}


def build(family="llama", dtype=torch.float32, seed=0, **changes):
    """A random model in eval mode; the same seed gives the same weights."""
    class_name, own = FAMILIES[family]
    config = getattr(tf, class_name)(**{**COMMON, **own, **changes})
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start: a bias that counts for a head would not show
                torch.nn.init.normal_(parameter, std=0.5)
    finally:
        torch.set_rng_state(state)
    return model


def tokens(batch, seq, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)


def acts_as(monkeypatch, projection, forward):
    """Let the projection do what `forward` does, while the library's table takes it for a plain linear layer."""
    kind = type("Linear", (type(projection),), {"forward": lambda self, x: forward(x)})
    function = kind.forward
    monkeypatch.setitem(LINEAR_FORWARDS, f"{function.__module__}.{function.__qualname__}", False)
    projection.__class__ = kind
