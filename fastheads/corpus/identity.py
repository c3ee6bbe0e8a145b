"""Hashes that identify a corpus and a tokenizer."""

import hashlib
import json
from typing import Any

from fastheads.corpus.readers import Document
from fastheads.corpus.sources import Source

HEAD_CHARACTERS = 2**16  # at the start of a corpus, whose hash helps to identify it


def tokenizer_fingerprint(tokenizer: Any, chat: bool = False) -> str:
    """Hash all that determines a text's tokens, including the chat template if the documents are chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Left over from the last call of the tokenizer; no effect here.
        facts: Any = [{key: value for key, value in state.items() if key not in ("truncation", "padding")}]
    else:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
        facts = [type(tokenizer).__qualname__, vocabulary]
    facts.append(getattr(tokenizer, "eos_token_id", None))
    if chat:
        facts.append(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def beginning_of(source: Source) -> tuple[str, str, bool]:
    """Return the hash of the corpus' first documents, their text (up to 4,096 characters), and True if one is a chat."""
    digest, taken, texts, chat = hashlib.sha256(), 0, "", False
    for item in source.items():
        content = document_bytes(item)[: HEAD_CHARACTERS - taken]
        digest.update(content + (b"" if source.kind == "stream" else b"\0"))
        taken += len(content) + 1
        if isinstance(item, str):
            texts += item[: 2**12 - len(texts)]
        chat |= not isinstance(item, str)
        if taken >= HEAD_CHARACTERS:
            break
    return digest.hexdigest(), texts, chat


def document_bytes(item: Document) -> bytes:
    """Encode a document for hashing: a text as UTF-8, a chat as JSON."""
    return item.encode() if isinstance(item, str) else json.dumps(item).encode()
