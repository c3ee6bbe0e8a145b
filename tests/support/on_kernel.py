"""Run a test of the kernel on a GPU, marked `gpu`, or under TRITON_INTERPRET=1 (see test_kernel.py) on the CPU."""

import math
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETED or torch.cuda.is_available()
MARKS = [
    # The interpreter computes with numpy, which warns of the infinities and NaN that some cases are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *(
        []
        if INTERPRETED
        else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def poison_fresh_buffers(monkeypatch, launcher):
    """Fill fresh buffers of the module `launcher` with NaN: a value that is read and was never written shows."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.detach().fill_(math.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(launcher.torch, "empty", nan_filled)
