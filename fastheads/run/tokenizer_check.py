"""Check a tokenizer that transformers built from a GGUF file: releases differ in which files they read rightly."""

import re
from itertools import islice
from typing import Any

from fastheads.errors import LoadError

# A word with the mark of the space before it, in SentencePiece's writing and in that of byte-level BPE.
WORD = re.compile("[▁Ġ][a-z]{4,10}")
SAMPLE = 200
FEWEST = 20  # words; smaller vocabularies are not checked
LEAST = 0.5  # of the words must be single tokens; of a tokenizer that merges nearly all are, of one that does not nearly none


def check_gguf_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise LoadError if the tokenizer splits words that are tokens of its own vocabulary: it lacks the file's merges."""
    from transformers import __version__

    words = sorted(
        ((index, word) for word, index in tokenizer.get_vocab().items() if WORD.fullmatch(word)),
    )
    if len(words) < FEWEST:
        return
    some = list(islice(words, 0, None, max(1, len(words) // SAMPLE)))
    whole = sum(
        tokenizer("a " + word[1:], add_special_tokens=False).input_ids[-1:] == [index] for index, word in some
    )
    if whole < LEAST * len(some):
        raise LoadError(
            f"the tokenizer that transformers {__version__} makes of {name} is wrong: it splits {len(some) - whole} of "
            f"{len(some)} words that are single tokens of its vocabulary. Install a newer transformers, or use the model's own "
            "repository"
        )
