"""A context in which products mean what they say, whatever the caller has set around it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The precision of float32 products is one setting of the process: the first thread that needs exact ones sets it, and the last
# one puts back what it was. By the type of device: what it was, once for each that is inside.
_inside: dict[str, list[str]] = {}
_lock = threading.Lock()


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, float32 products in float32 (not TF32 or bfloat16), whatever is set around it."""
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    kind = "cpu" if device_type == "cpu" else "cuda"
    matmul = backends.mkldnn.matmul if kind == "cpu" else backends.cuda.matmul
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        with _lock:
            inside = _inside.setdefault(kind, [])
            # Only the first one finds what it was.
            inside.append(inside[0] if inside else matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            with _lock:
                before = inside.pop()
                if not inside:
                    matmul.fp32_precision = before
