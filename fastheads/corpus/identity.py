"""Hashes that tell one corpus, and one tokenizer, from another."""

import hashlib
import json
from typing import Any

from fastheads.corpus.readers import Item
from fastheads.corpus.sources import Source

HEAD_CHARACTERS = 2**16  # whose hash names a corpus


def tokenizer_fingerprint(tokenizer: Any, chat: bool = False) -> str:
    """A hash of what makes tokens of texts, with the template where there are chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by whoever called it last, and of no effect here.
        facts: Any = [{key: value for key, value in state.items() if key not in ("truncation", "padding")}]
    else:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
        facts = [type(tokenizer).__qualname__, vocabulary]
    facts.append(getattr(tokenizer, "eos_token_id", None))
    if chat:
        facts.append(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def head_of(source: Source) -> tuple[str, str, bool]:
    """The hash of how the corpus begins, the first texts of it, and whether there are chats among them."""
    digest, taken, texts, chat = hashlib.sha256(), 0, "", False
    for item in source.items():
        content = item_bytes(item)[: HEAD_CHARACTERS - taken]
        digest.update(content + (b"" if source.kind == "stream" else b"\0"))
        taken += len(content) + 1
        if isinstance(item, str):
            texts += item[: 2**12 - len(texts)]
        chat |= not isinstance(item, str)
        if taken >= HEAD_CHARACTERS:
            break
    return digest.hexdigest(), texts, chat


def item_bytes(item: Item) -> bytes:
    """A document as it is hashed: a text as UTF-8, a chat as JSON."""
    return item.encode() if isinstance(item, str) else json.dumps(item).encode()
