"""Tokenizers of a few words, with the marks that tokenizers of models have."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}ten{% endif %}"


def special_tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words, with a BOS in front of each text where it is asked for (1), and an EOS that is not added (2)."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i for i, word in enumerate(WORDS, start=3)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokens = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **tokens)


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = special_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
