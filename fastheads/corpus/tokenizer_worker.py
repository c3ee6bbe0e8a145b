"""From documents to token ids; run as a process, from its standard input to its standard output.

Such a process imports the tokenizers library alone, unless the tokenizer is one that only transformers can run.
"""

import json
import os
import pickle
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO

from fastheads.corpus.readers import Item
from fastheads.errors import DataError, FastheadsError, one_line


class Encoder:
    """Token ids as the tokenizer gives them: of texts by its backend alone, where that gives the same."""

    def __init__(
        self, tokenizer: Any, backend: str | None = None, split_special: bool = False, loaded: Any = None
    ) -> None:
        """`backend`: the JSON of a `tokenizers.Tokenizer` that does what `tokenizer` would; `loaded`: it itself."""
        self.tokenizer, self.backend, self.split_special = tokenizer, backend, split_special
        self._fast = loaded

    def __call__(self, items: Sequence[Item], special: bool, first: int = 0) -> list[array]:
        """The ids of each document; `first` is the number of the first of them, for messages.

        `special`: with what the tokenizer adds to a text, such as a BOS token.
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
            # A template writes BOS and the like itself.
            array("i", token_ids(self.tokenizer, text, special and isinstance(item, str)))
            for item, text in zip(items, texts, strict=True)
        ]

    def _rendered(self, chat: list[dict[str, str]], number: int) -> str:
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"the tokenizer makes no text of document {number}: {one_line(error, 300)}"
            ) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            raise DataError(
                f"the tokenizer's chat template refuses document {number}: {one_line(error, 300)}"
            ) from error
        return str(text)

    def packed(self) -> bytes:
        """What a process of our own makes the same encoder of."""
        if self.backend is not None:
            return json.dumps({"backend": self.backend, "split_special": self.split_special}).encode()
        return pickle.dumps(self.tokenizer)

    @classmethod
    def unpacked(cls, content: bytes) -> "Encoder":
        if content.startswith(b"{"):
            return cls(None, **json.loads(content))
        return cls(pickle.loads(content))


def token_ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    """What the tokenizer itself gives."""
    # verbose: else a text longer than the model's window draws a warning, and every stream is.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def load_backend(backend: str, split_special: bool) -> Any:
    """The `tokenizers.Tokenizer` of that JSON, that neither cuts nor pads."""
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
    """What the other end sent; None if it has ended."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    content = stream.read(length)
    return content if len(content) == length else None


def serve() -> None:
    """Encode what comes in until the other end closes, which it does when it ends, however it ends."""
    incoming = sys.stdin.buffer
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nobody's print() shall come between
    encoder: Encoder | None = None
    while (content := receive(incoming)) is not None:
        ids: list[array] = []
        head: dict[str, Any]
        try:
            if encoder is None:
                encoder = Encoder.unpacked(content)
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
    # The stream's own closing would complain of a reader that has gone.
    os._exit(0)
