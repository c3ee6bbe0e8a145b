"""A context in which products mean what they say, whatever the caller has set around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic(device_type: str) -> Iterator[None]:
    """No gradients, no autocast, float32 products in float32 (not TF32 or bfloat16), whatever is set around it."""
    backends: Any = torch.backends  # its modules set attributes that type checkers do not know
    matmul = backends.mkldnn.matmul if device_type == "cpu" else backends.cuda.matmul
    before = matmul.fp32_precision
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
