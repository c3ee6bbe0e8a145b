"""A context for exact float32 products, independent of the caller's modes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The precision of float32 products is a setting of the whole process: the first thread to enter sets it, and the last to leave
# restores it. By device type: the setting before, once for each thread inside.
_inside: dict[str, list[str]] = {}
_lock = threading.Lock()


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """Turn off gradients and autocast, and compute float32 products in float32 (not TF32 or bfloat16)."""
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    kind = "cpu" if device_type == "cpu" else "cuda"
    matmul = backends.mkldnn.matmul if kind == "cpu" else backends.cuda.matmul
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        with _lock:
            inside = _inside.setdefault(kind, [])
            # Only the first finds the caller's setting.
            inside.append(inside[0] if inside else matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            with _lock:
                before = inside.pop()
                if not inside:
                    matmul.fp32_precision = before
