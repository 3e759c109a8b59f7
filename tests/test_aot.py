"""The kernels compiled ahead of time, and their machine code held to tests/aot.py's table."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*command):
    """Output of a Python program beside this file, one thread, kernels compiled, not interpreted."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parent)
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]
    return done.stdout


@pytest.mark.program("aot")
def test_one_target(program):
    assert program.strip()


@pytest.mark.slow
def test_every_target_and_type():
    assert run("aot.py").strip()


def test_launch_code_under_fake_cuda_tensors():
    run("-c", "import aot; aot.fake_launches()")


def test_every_kernel_by_its_own_launcher():
    run("-c", "import aot; aot.own_launcher()")


def test_a_torn_reduction_is_seen():
    run("-c", "import aot; aot.torn_is_seen()")


@pytest.mark.parametrize("target", ("80", "90", "100", "gfx942"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_each_gate_can_fail(target, dtype):
    pytest.importorskip("triton")
    import aot
    name, arguments, options = "backward_kernel 0 nchw", dict(BG=1, BC=4, BP=1024), dict(num_warps=4)
    _, _, *ceilings = aot.GATES[name]
    registers, per_value = ceilings[2:] if target == "gfx942" else ceilings[:2]
    values = 16 if target == "gfx942" else 32  # of the tile's 4,096 for each thread
    wide = values * aot.DTYPES[dtype].itemsize // 16
    right = dict(memory=0, spills=0, torn=0, registers=registers, instructions=per_value * values, loads=2 * wide, stores=wide)
    complaints = lambda **wrong: aot.check(name, target, dtype, arguments, options, right | wrong)
    assert complaints() == []
    for wrong, says in ((dict(spills=1), "spills = 1"), (dict(memory=8), "memory = 8"), (dict(torn=1), "torn = 1"),
                        (dict(registers=2 * registers), "registers over"), (dict(loads=2 * wide - 1), "128-bit loads"),
                        (dict(loads=0), "128-bit loads"), (dict(stores=0), "128-bit stores"),
                        (dict(instructions=2 * per_value * values), "instructions over")):
        (complaint,) = complaints(**wrong)
        assert says in complaint
