"""The kernels compiled ahead of time, and their machine code held to tests/aot.py's table."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


def gate(*arguments):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("aot.py")), *arguments],
                          capture_output=True, text=True, env=environment)
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0 and done.stdout.strip(), "\n".join(failed) or done.stderr[-3000:]


def test_one_target():
    gate("--targets", "90", "--dtypes", "bf16")


@pytest.mark.slow
def test_every_target_and_type():
    gate()
