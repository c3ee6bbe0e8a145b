"""Run what needs the kernel through Triton's interpreter, each file in a process of its own.

`TRITON_INTERPRET` is read when the kernel is imported: setting it here would change what other tests import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
# numpy, which the interpreter computes with, says of NaN and infinity what a GPU does not
QUIET = ["-W", "ignore:invalid value", "-W", "ignore:overflow", "-W", "ignore:divide by zero"]
CASES = {
    "backends/test_kernel_vectors.py": [],
    "backends/test_kernel_cases.py": [],
    "backends/test_kernel_ratio.py": [],
    # The manager with backend="triton" on CPU tensors. Squares beyond float32 are the torch paths' alone.
    "backends/test_backends.py": ["-k", "triton and not beyond_the_range", *QUIET],
    "models/test_residual.py": ["-k", "triton and gemma2", *QUIET],
    "capture/test_repeated_launches.py": QUIET,
    "capture/test_packed.py": ["-k", "triton", *QUIET],
    "capture/test_mean_vectors.py": ["-k", "triton", *QUIET],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=pytest.mark.xdist_group(f"interpreter {file}")) for file in CASES]
)
def test_the_cases_hold_in_the_interpreter(file) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(TESTS / file), *CASES[file]],
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout  # and not all skipped


def test_importing_fastheads_does_not_import_triton() -> None:
    program = "import sys, fastheads; sys.exit('triton' in sys.modules or 'fastheads.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
