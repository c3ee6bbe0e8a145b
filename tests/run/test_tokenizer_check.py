"""A tokenizer that lacks its merges is refused: its tokens are not those that the model was trained on."""

import itertools

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastheads.errors import LoadError
from fastheads.run.tokenizer_check import check_gguf_tokenizer

WORDS = ["".join(letters) for letters in itertools.product("abcd", repeat=4)]


def tokenizer_of(mark, words, *, merges):
    """A BPE tokenizer whose vocabulary holds the words, with a `mark` for the space before each."""
    pieces = dict.fromkeys([*"abcd", mark])
    pairs = {}
    for word in words:
        for stop in range(1, len(word) + 1):
            pairs[mark + word[: stop - 1], word[stop - 1]] = None
            pieces[mark + word[:stop]] = None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, list(pairs) if merges else [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if mark == "Ġ"
        else pre_tokenizers.Metaspace(prepend_scheme="never")
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("mark", "▁Ġ")
def test_words_of_the_vocabulary_are_single_tokens(mark):
    check_gguf_tokenizer(tokenizer_of(mark, WORDS, merges=True), "model.gguf")
    says = r"makes of model\.gguf is wrong: it splits 256 of 256 words .* Install a newer transformers"
    with pytest.raises(LoadError, match=says):
        check_gguf_tokenizer(tokenizer_of(mark, WORDS, merges=False), "model.gguf")


def test_a_vocabulary_with_few_words_says_nothing():
    check_gguf_tokenizer(tokenizer_of("Ġ", WORDS[:10], merges=False), "model.gguf")
