"""A tiny Llama with its tokenizer as a local folder, for what starts from a name."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, HEADS, POSITIONS = 3, 4, 64
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 5


def tiny_llama(seed: int = 0, positions: int = POSITIONS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=130,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character: its code point plus one; 0 is for all others, and pads."""
    vocabulary = {"<unk>": 0} | {chr(i): i + 1 for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def save_checkpoint(folder: Path, positions: int = POSITIONS) -> Path:
    tiny_llama(positions=positions).save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    return folder
