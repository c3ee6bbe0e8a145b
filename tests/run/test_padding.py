"""Batches are padded on the right, by an id that the model embeds, whatever the tokenizer's is."""

import pytest
from checkpoints import ascii_tokenizer, tiny_llama
from whole_profiles import assert_same, some_texts

from fastheads import profile


@pytest.mark.parametrize("given", [130, 10_000, -1, None])
def test_a_padding_id_that_the_model_does_not_embed_is_none(given):
    model, texts = tiny_llama(), some_texts(12)
    expected = profile(model, texts, tokenizer=ascii_tokenizer(), batch_size=4)

    class Tokenizer(type(ascii_tokenizer())):
        pad_token_id = given

    tokenizer = ascii_tokenizer()
    tokenizer.__class__ = Tokenizer
    assert tokenizer.pad_token_id == given
    assert_same(profile(model, texts, tokenizer=tokenizer, batch_size=4), expected)
