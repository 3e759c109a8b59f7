"""The kernels compiled ahead of time, and their machine code held to tests/aot.py's table."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.program("aot")
def test_one_target(program):
    assert program.strip()


@pytest.mark.slow
def test_every_target_and_type():
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).with_name("aot.py")], text=True,
                          capture_output=True, env=clean | {"OMP_NUM_THREADS": "1"})
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr[-3000:]


@pytest.mark.program("launches")
def test_launch_code_torn_reductions_and_the_own_launcher(program):
    """Launch code under fake CUDA tensors; a torn reduction is seen; Triton's launcher takes it."""
    assert program.endswith("launches right\n")


@pytest.mark.parametrize("target", ("80", "90", "100", "gfx942"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_each_gate_can_fail(target, dtype):
    pytest.importorskip("triton")
    import aot
    name, options = "backward_kernel 0 nchw", dict(num_warps=4)
    arguments = dict(BG=1, BC=4, BP=1024)
    _, _, *ceilings = aot.GATES[name]
    registers, per_value = ceilings[2:] if target == "gfx942" else ceilings[:2]
    values = 16 if target == "gfx942" else 32  # of the tile's 4,096 for each thread
    wide = values * aot.DTYPES[dtype].itemsize // 16
    right = dict(memory=0, spills=0, torn=0, registers=registers, instructions=per_value * values,
                 loads=2 * wide, stores=wide)

    def complaints(**wrong):
        return aot.check(name, target, dtype, arguments, options, right | wrong)

    assert complaints() == []
    for wrong, says in ((dict(spills=1), "spills = 1"), (dict(memory=8), "memory = 8"),
                        (dict(torn=1), "torn = 1"),
                        (dict(registers=2 * registers), "registers over"),
                        (dict(loads=2 * wide - 1), "128-bit loads"),
                        (dict(loads=0), "128-bit loads"), (dict(stores=0), "128-bit stores"),
                        (dict(instructions=2 * per_value * values), "instructions over")):
        (complaint,) = complaints(**wrong)
        assert says in complaint
