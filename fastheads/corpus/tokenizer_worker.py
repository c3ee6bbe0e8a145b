"""Encode documents to token ids; `serve` is the main function of a worker process.

A worker imports only the tokenizers library, unless the tokenizer needs transformers.
"""

import json
import os
import pickle
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO

from fastheads.corpus.readers import Document
from fastheads.errors import DataError, FastheadsError, one_line


class Encoder:
    """Encode documents to the ids that the tokenizer gives, with its backend alone where that gives the same."""

    def __init__(
        self, tokenizer: Any, backend: str | None = None, split_special: bool = False, loaded: Any = None
    ) -> None:
        """`backend`: JSON of a `tokenizers.Tokenizer` equivalent to `tokenizer`; `loaded`: that object, if loaded already."""
        self.tokenizer, self.backend, self.split_special = tokenizer, backend, split_special
        self._fast = loaded

    def __call__(self, items: Sequence[Document], special: bool, first: int = 0) -> list[array]:
        """Return the ids of each document.

        `special`: add special tokens, such as BOS. `first`: number of the first document, for error messages.
        """
        texts = [
            item if isinstance(item, str) else self._rendered(item, number)
            for number, item in enumerate(items, start=first)
        ]
        if self.backend is not None and all(isinstance(item, str) for item in items):
            if self._fast is None:
                self._fast = load_backend(self.backend, self.split_special)
            found = self._fast.encode_batch_fast(texts, add_special_tokens=special)
            return [array("i", one.ids) for one in found]
        return [
            # A chat template writes BOS itself.
            array("i", token_ids(self.tokenizer, text, special and isinstance(item, str)))
            for item, text in zip(items, texts, strict=True)
        ]

    def _rendered(self, chat: list[dict[str, str]], number: int) -> str:
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"the tokenizer cannot make a text of document {number}: {one_line(error, 300)}"
            ) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            raise DataError(
                f"the tokenizer's chat template refuses document {number}: {one_line(error, 300)}"
            ) from error
        return str(text)

    def serialize(self) -> bytes:
        """Serialize the encoder for a worker process."""
        if self.backend is not None:
            return json.dumps({"backend": self.backend, "split_special": self.split_special}).encode()
        return pickle.dumps(self.tokenizer)

    @classmethod
    def deserialize(cls, content: bytes) -> "Encoder":
        if content.startswith(b"{"):
            return cls(None, **json.loads(content))
        return cls(pickle.loads(content))


def token_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Return the ids that the tokenizer gives."""
    # verbose=False: else a text longer than the model's context, as any stream is, draws a warning.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def load_backend(backend: str, split_special: bool) -> Any:
    """Load a `tokenizers.Tokenizer` from JSON, without truncation or padding."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(backend)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = split_special
    return loaded


def send(stream: BinaryIO, content: bytes) -> None:
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> bytes | None:
    """Receive a message; None if the other end has closed."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    content = stream.read(length)
    return content if len(content) == length else None


def serve() -> None:
    """Answer requests on standard input until it closes, as it does when the parent ends, even if killed."""
    incoming = sys.stdin.buffer
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep prints of libraries out of the answers
    encoder: Encoder | None = None
    while (content := receive(incoming)) is not None:
        ids: list[array] = []
        head: dict[str, Any]
        try:
            if encoder is None:
                encoder = Encoder.deserialize(content)
                head = {"lengths": []}
            else:
                ids = encoder(**json.loads(content))
                head = {"lengths": list(map(len, ids))}
        except Exception as error:
            head = {"error": one_line(error, 300), "data": isinstance(error, FastheadsError)}
        try:
            send(outgoing, json.dumps(head).encode())
            send(outgoing, b"".join(map(array.tobytes, ids)))
        except BrokenPipeError:
            break
    # A normal exit would flush to a closed pipe, and print an error.
    os._exit(0)
