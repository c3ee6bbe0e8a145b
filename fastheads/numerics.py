"""A context in which products mean what they say, whatever the caller has set around it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The precision of float32 products is one setting of the process: the first thread that needs exact ones sets it, and the last
# one puts back what it was. By the type of device: how many are inside, and what it was.
_inside: dict[str, tuple[int, str]] = {}
_lock = threading.Lock()


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, float32 products in float32 (not TF32 or bfloat16), whatever is set around it."""
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    kind = "cpu" if device_type == "cpu" else "cuda"
    matmul = backends.mkldnn.matmul if kind == "cpu" else backends.cuda.matmul
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        with _lock:
            count, before = _inside.get(kind, (0, ""))
            if not count:
                before = matmul.fp32_precision
                matmul.fp32_precision = "ieee"
            _inside[kind] = count + 1, before
        try:
            yield
        finally:
            with _lock:
                count, before = _inside[kind]
                _inside[kind] = count - 1, before
                if count == 1:
                    matmul.fp32_precision = before
