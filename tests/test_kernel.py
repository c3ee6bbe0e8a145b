"""Runs the kernel's cases through Triton's interpreter, in a process of their own.

`TRITON_INTERPRET` is read when the kernel is imported: setting it here would change what other tests import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


# numpy, which the interpreter computes with, says of NaN and infinity what a GPU does not
QUIET = ["-W", "ignore:invalid value", "-W", "ignore:overflow", "-W", "ignore:divide by zero"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("test_kernel_cases.py", []),
        # The manager with backend="triton" on CPU tensors. Squares beyond float32 are the torch paths' alone.
        ("test_backends.py", ["-k", "triton and not beyond_the_range", *QUIET]),
        ("test_residual.py", ["-k", "triton and gemma2", *QUIET]),
        ("test_repeated_launches.py", QUIET),
        ("test_packed.py", ["-k", "triton", *QUIET]),
    ],
)
def test_the_cases_hold_in_the_interpreter(file, options) -> None:
    cases = Path(__file__).with_name(file)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(cases), *options],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        cwd=cases.parents[1],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout  # and not all skipped


def test_importing_fastheads_does_not_import_triton() -> None:
    program = "import sys, fastheads; sys.exit('triton' in sys.modules or 'fastheads.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
