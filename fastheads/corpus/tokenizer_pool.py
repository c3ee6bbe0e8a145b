"""Tokenize ahead of the model, in worker processes or in a thread.

The workers are plain subprocesses that communicate over pipes. multiprocessing would run the caller's script again (spawn,
forkserver) or copy a process that uses a GPU (fork), and its pools leave orphans when the parent is killed. These workers end
when the pipe closes, and Ctrl-C on the terminal does not reach them.
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

from fastheads.corpus.readers import Document
from fastheads.corpus.tokenizer_worker import Encoder, load_backend, receive, send, token_ids
from fastheads.errors import DataError, OptionError, TokenizerError

PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastheads.corpus.tokenizer_worker import serve; serve()"


def make_encoder(tokenizer: Any, probe: str, chat: bool) -> Encoder:
    """Make an encoder of `tokenizer`: its backend alone, if there are no chats and that gives the same tokens for `probe`."""
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
    """Tokenize submitted documents in `workers` processes, or in one thread if that is 0."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder, self._workers = encoder, workers
        self._serialized = b""
        if workers:
            try:
                self._serialized = encoder.serialize()
            except Exception as error:
                raise OptionError(
                    f"the tokenizer cannot be sent to other processes ({error}): use workers=0"
                ) from error
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fastheads-tokenizing")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, items: Sequence[Document], special: bool, first: int = 0) -> "Future[list[Tensor]]":
        """Return a future of each document's ids, int32 `[tokens]`; the arguments are those of `Encoder.__call__`."""
        return self._threads.submit(self._run, items, special, first)

    def _run(self, items: Sequence[Document], special: bool, first: int) -> list[Tensor]:
        if not self._workers:
            return [_tensor(ids) for ids in self._encoder(items, special, first)]
        try:
            process = self._idle.get_nowait()
        except queue.Empty:  # one process per thread, started when first needed
            with self._lock:
                if self._closed:
                    raise TokenizerError("the tokenizer pool is closed: open the windows again") from None
                process = _Process()
                self._all.append(process)
            process.ask(self._serialized)
        found = process.ask(json.dumps({"items": items, "special": special, "first": first}).encode())
        self._idle.put(process)
        return found

    def close(self) -> None:
        """Kill the processes and cancel what is queued, without waiting for a thread's current work."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.end()


class _Process:
    """A worker process (`tokenizer_worker.serve`)."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path)]
        # One core each; this also silences the libraries' warnings about forks and threads.
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
        """Send a request and return the ids of its documents.

        Raises:
            DataError: a document cannot be tokenized.
            TokenizerError: the tokenizer failed, or the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        ids = head = None
        try:
            send(self.process.stdin, content)  # type: ignore[arg-type]
            head = receive(self.process.stdout)  # type: ignore[arg-type]
            ids = receive(self.process.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):  # a broken pipe, or one closed by close()
            pass
        if head is None or ids is None:
            raise TokenizerError(
                f"a tokenizing process {self._end()}: workers=0 tokenizes in this process instead"
            )
        found = json.loads(head)
        if "error" in found:
            if found["data"]:
                raise DataError(found["error"])
            raise TokenizerError(f"the tokenizer failed in its worker process: {found['error']}")
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
            except (OSError, ValueError):  # unsent bytes have no reader any more
                pass


def _tensor(ids: array) -> Tensor:
    # Shares the array's memory, and keeps it alive.
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)
