"""Tokenizing ahead of the model, in processes of our own or in a thread.

The processes are plain ones that talk over pipes. Those of multiprocessing would run the caller's script once more
(started by spawn or forkserver) or copy a process that uses a GPU (by fork), and its pools leave theirs behind when
the parent is killed. Ours end with the pipe, and Ctrl-C on the terminal does not reach them.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastheads.corpus.readers import Item
from fastheads.corpus.tokenizer_worker import Encoder, load_backend, receive, send, token_ids
from fastheads.errors import DataError, OptionError, TokenizerError

PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastheads.corpus.tokenizer_worker import serve; serve()"


def encoder_of(tokenizer: Any, probe: str, chat: bool) -> Encoder:
    """The encoder of `tokenizer`: its backend alone if that gives the same for `probe` and there are no chats."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or chat or not hasattr(backend, "encode_batch_fast"):
        return Encoder(tokenizer)
    text, split = backend.to_str(), bool(getattr(tokenizer, "split_special_tokens", False))
    alone = load_backend(text, split)
    for special in (True, False):
        if alone.encode(probe, add_special_tokens=special).ids != token_ids(tokenizer, probe, special):
            return Encoder(tokenizer)
    return Encoder(tokenizer, text, split, alone)


class TokenizerPool:
    """`submit` documents, get futures of their ids; `workers` processes do the work, or one thread where it is 0."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder, self._workers = encoder, workers
        self._packed = b""
        if workers:
            try:
                self._packed = encoder.packed()
            except Exception as error:
                raise OptionError(
                    f"this tokenizer cannot be given to other processes ({error}): use workers=0"
                ) from error
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fastheads-tokenizing")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, items: Sequence[Item], special: bool, first: int = 0) -> "Future[list[Tensor]]":
        """The ids of each document, int32 `[tokens]`; the arguments are those of `Encoder`."""
        return self._threads.submit(self._run, items, special, first)

    def _run(self, items: Sequence[Item], special: bool, first: int) -> list[Tensor]:
        if not self._workers:
            return [_tensor(ids) for ids in self._encoder(items, special, first)]
        try:
            process = self._idle.get_nowait()
        except queue.Empty:  # there are as many threads as processes are wanted
            with self._lock:
                if self._closed:
                    raise TokenizerError("tokenising has been closed") from None
                process = _Process()
                self._all.append(process)
            process.ask(self._packed)
        found = process.ask(json.dumps({"items": items, "special": special, "first": first}).encode())
        self._idle.put(process)
        return found

    def close(self) -> None:
        """End the processes and forget what was submitted. Does not wait for a thread's present work."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.end()


class _Process:
    """A process that encodes."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path)]
        # One core each, and the libraries' talk of forks and threads stays away.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def ask(self, content: bytes) -> list[Tensor]:
        """The ids of what `content` asks for.

        Raises:
            DataError: a document cannot be made tokens of.
            TokenizerError: the tokenizer failed, or the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        ids = head = None
        try:
            send(self.process.stdin, content)  # type: ignore[arg-type]
            head = receive(self.process.stdout)  # type: ignore[arg-type]
            ids = receive(self.process.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):  # a broken pipe, or one that close() has shut
            pass
        if head is None or ids is None:
            raise TokenizerError(f"a tokenising process {self._end()}; with workers=0 there is none")
        found = json.loads(head)
        if "error" in found:
            if found["data"]:
                raise DataError(found["error"])
            raise TokenizerError(f"the tokenizer failed in a process of its own: {found['error']}")
        whole = array("i", ids)
        return list(_tensor(whole).split(found["lengths"])) if found["lengths"] else []

    def _end(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"ended with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except (OSError, ValueError):  # what was being written has nobody to go to
                pass


def _tensor(ids: array) -> Tensor:
    # Over the array's own memory, which the tensor keeps.
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)
