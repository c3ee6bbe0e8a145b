"""Runs the kernel's cases through Triton's interpreter, in a process of their own.

`TRITON_INTERPRET` is read when the kernel is imported: setting it here would change what other tests import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_cases_hold_in_the_interpreter() -> None:
    cases = Path(__file__).with_name("test_kernel_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        str(cases),
    ]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, cwd=cases.parents[1]
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout  # and not all skipped


def test_importing_fastheads_does_not_import_triton() -> None:
    program = "import sys, fastheads; sys.exit('triton' in sys.modules or 'fastheads.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
