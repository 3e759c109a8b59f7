"""Ahead-of-time gate of kernels/, no GPU needed:

    python tests/aot.py [--targets 90,gfx942] [--dtypes bf16]

The public functions run on CPU tensors that claim to be on a GPU, and each launch is recorded, not
made: what is compiled here is what is launched there (argument types, alignment, constants, warps).
Every kernel is compiled for every target, and its machine code must have no stack, no local memory,
no spills, all 128-bit global accesses that its tile allows, and stay under the ceilings of one
table. Prints a line a kernel; exit status 1 if one fails.
"""
import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import group_norm  # noqa: E402
from kernels.bench import (  # noqa: E402
    DTYPES, TARGETS, cases, machine_code, recorded, source, tile_per_thread)

# Tile-sized streams that must be read and written 128 bits at a time, each by its type: e that of
# the case, 4 fp32. Then ceilings, first for NVIDIA (worst of three targets and three types), then
# for gfx942: registers, and instructions per value of the tile, all of the program counted (None:
# it loops over something else). A kernel named without a case is the same code in all of them.
GATES = {
    "forward_kernel 0 nchw": ("e", "e", 64, 18, 47, 32),
    "forward_kernel 0 last": ("e", "e", 68, 18, 59, 31),
    "forward_kernel 0 largest": ("e", "e", 140, 17, 84, 28),
    "forward_kernel 0 odd": ("", "", 36, 22, 34, 57),
    "forward_kernel 1 nchw large": ("e", "", 48, 8, 25, 16),
    "forward_kernel 1 last large": ("e", "", 56, 9, 34, 17),
    "forward_kernel 2 nchw large": ("e", "e", 48, 14, 45, 23),
    "forward_kernel 2 last large": ("e", "e", 68, 14, 50, 22),
    "combine_kernel": ("", "", 24, None, 8, None),
    "backward_kernel 0 nchw": ("ee", "e", 96, 29, 73, 45),
    "backward_kernel 0 last": ("ee", "e", 128, 34, 83, 55),
    "backward_kernel 0 largest": ("ee", "e", 96, 38, 98, 48),
    "backward_kernel 0 odd": ("", "", 56, 41, 40, 105),
    "backward_kernel 1 nchw large": ("ee", "", 48, 23, 75, 38),
    "backward_kernel 1 last large": ("ee", "", 92, 27, 91, 49),
    "backward_kernel 2 nchw large": ("ee", "e", 88, 21, 64, 30),
    "backward_kernel 2 last large": ("ee", "e", 104, 23, 70, 33),
    "forward_kernel 0 groups last": ("e", "e", 72, 20, 61, 37),
    "forward_kernel 1 groups last large": ("e", "", 56, 10, 34, 20),
    "forward_kernel 2 groups last large": ("e", "e", 68, 14, 51, 22),
    "backward_kernel 0 groups last": ("ee", "e", 128, 31, 91, 56),
    "backward_kernel 1 groups last large": ("ee", "", 92, 27, 91, 49),
    "backward_kernel 2 groups last large": ("ee", "e", 116, 23, 70, 31),
    "parameters_kernel": ("", "", 80, None, 52, None),
    "parameters_kernel odd": ("", "", 56, None, 36, None),
    "forward_kernel 0 deep last": ("e", "e", 112, 19, 82, 34),
    "backward_kernel 0 deep last": ("ee", "e", 116, 40, 132, 46),
    "forward_kernel 0 wide last": ("e", "e", 72, 20, 61, 37),
    "backward_kernel 0 wide last": ("ee", "e", 130, 31, 83, 50),
    "forward_kernel 0 one last": ("e", "e", 80, 23, 62, 49),
    "backward_kernel 0 one last": ("ee", "e", 130, 32, 91, 56),
    "forward_kernel 0 narrow last": ("e", "e", 105, 16, 69, 26),
    "backward_kernel 0 narrow last": ("ee", "e", 82, 38, 157, 56),
    "forward_kernel 1 narrow last": ("e", "", 57, 10, 34, 20),
    "forward_kernel 2 narrow last": ("e", "e", 66, 15, 48, 21),
    "backward_kernel 1 narrow last": ("ee", "", 82, 27, 82, 48),
    "backward_kernel 2 narrow last": ("ee", "e", 86, 24, 72, 29),
    "randn_kernel ints": ("", "e", 64, 29, 30, 41),
    "randn_kernel tensors": ("", "e", 64, 29, 30, 42),
    "add_noise_kernel uint8 flipped": ("", "44", 108, 39, 40, 58),
    "add_noise_kernel uint8 alone": ("", "4", 66, 38, 40, 44),
    "add_noise_kernel float": ("e", "ee", 88, 34, 47, 52),
    "add_noise_kernel last": ("", "", 104, 64, 51, 104),
    "denoise_kernel plain": ("4e", "4", 64, 42, 45, 58),
    "denoise_kernel guided": ("4ee4", "44", 80, 54, 58, 71),
    "denoise_kernel clipped": ("4e", "4", 64, 44, 45, 61),
    "denoise_kernel mixed": ("4", "4", 78, 54, 43, 72),
    "denoise_backward_kernel clipped": ("44e", "e", 40, 15, 30, 21),
}


def gate(name, dtype):
    """The row of GATES for a case."""
    return next(row for row in (f"{name} {dtype}", name, name.split()[0]) if row in GATES)


def check(name, target, dtype, arguments, options, got):
    """The complaints about one compiled kernel, [] if it passes."""
    nvidia = TARGETS[target].backend == "cuda"
    read, written, *ceilings = GATES[gate(name, dtype)]
    registers, per_value = ceilings[:2] if nvidia else ceilings[2:]
    slack = 1 if triton.__version__ >= "3.7" else 1.15  # the table is of Triton 3.7
    values = tile_per_thread(arguments, options, 32 if nvidia else 64)
    size = {"e": DTYPES[dtype].itemsize, "4": 4}
    problems = [f"{key} = {got[key]}" for key in ("memory", "spills", "torn") if got[key]]
    if got["registers"] > slack * registers:
        problems.append(f"registers over {registers}")
    steps = arguments.get("LOOPS", 1)
    twice = 2 if steps > 1 else 1  # in steps everything is read again
    for key, streams in (("loads", twice * read), ("stores", written)):
        # a thread's values of a step may be fewer than fill 128 bits (16-bit types, gfx942)
        need = sum(steps * (values // steps * size[s] // 16) for s in streams)
        if got[key] < need:
            problems.append(f"128-bit {key} under {need}")
    if per_value and got["instructions"] > slack * per_value * values:
        problems.append(f"instructions over {per_value} x {values}")
    return problems


def fake_launches():
    """group_norm on CUDA tensors without data: the operator promises what the launch code makes,
    and that launches what it should. (Gradients, noise and diffuse need a device guard, which
    PyTorch built without CUDA does not have.)"""
    one, split = ["forward_kernel"], ["forward_kernel", "combine_kernel", "forward_kernel"]
    for shape, groups, layout, expected in (((4, 32, 8, 8), 8, torch.contiguous_format, one),
                                            ((4, 32, 8, 8), 8, torch.channels_last, one),
                                            ((2, 64, 128, 128), 16, torch.contiguous_format, split),
                                            ((2, 64, 128, 128), 16, torch.channels_last, split)):
        with FakeTensorMode(), mock.patch("torch.cuda.device_of", lambda x: nullcontext()):
            x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=layout)
            weight, bias = (torch.empty(shape[1], device="cuda") for _ in range(2))
            scale, shift = torch.empty(shape[0], 2 * shape[1], device="cuda").chunk(2, 1)
            told, made = [group_norm.group_norm(x, groups, weight, bias, scale, shift)], []
            told.append(
                group_norm.group_norm_op(x, weight, bias, scale, shift, groups, True, 1e-5)[1])
            launches = recorded(lambda: made.extend(
                group_norm._forward(x, weight, bias, scale, shift, groups, True, 1e-5)))
            kind = lambda v: (v.shape, v.stride(), v.dtype, v.device)
            assert [*map(kind, told)] == [*map(kind, made)] and told[0].stride() == x.stride()
            assert [kernel.fn.__name__ for kernel, _, _ in launches] == expected, launches


@triton.jit
def torn_kernel(x_ptr, y_ptr):
    """Sums of 16 channels and 16 positions for two groups in one go, which Triton tears: see
    sum_groups of kernels/group_norm.py."""
    c, p = tl.arange(0, 32), tl.arange(0, 16)
    x = tl.load(x_ptr + p[None, :] * 32 + c[:, None]).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, 2), tl.sum(tl.reshape(x, (2, 256)), 1))


@triton.jit
def whole_kernel(x_ptr, y_ptr):
    """The same in two sums."""
    c, p = tl.arange(0, 32), tl.arange(0, 16)
    x = tl.load(x_ptr + p[None, :] * 32 + c[:, None]).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, 2), tl.sum(tl.sum(tl.reshape(x, (2, 16, 16)), 1), 1))


def torn_is_seen():
    """In Triton's own text, whose form may change with its version."""
    for kernel, wanted in ((torn_kernel, 1), (whole_kernel, 0)):
        given = dict(x_ptr=torch.zeros(512, dtype=torch.bfloat16), y_ptr=torch.zeros(2))
        assert machine_code(kernel, given, dict(num_warps=1), "90")["torn"] == wanted, (
            kernel.fn.__name__)


def own_launcher():
    """Every launch by Triton's own code as far as it goes without a GPU, which is to the compiled
    kernel. What `source` builds by hand never meets its checks: it takes no parameter named as one
    of its own (stream, device), for one."""
    driver = SimpleNamespace(get_current_target=lambda: TARGETS["90"],
                             get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    triton.runtime.driver.set_active(driver)
    done = set()
    for name, (kernel, arguments, options) in cases(torch.float32).items():
        if kernel not in done:
            assert kernel.warmup(**arguments, grid=(1,), **options).asm["cubin"], name
            done.add(kernel)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    args = parser.parse_args()
    failed, compiled, held = False, {}, set()
    for dtype in args.dtypes.split(","):
        for name, (kernel, arguments, options) in cases(DTYPES[dtype]).items():
            for target in args.targets.split(","):
                key = (source(kernel, arguments).hash(), str(options), target)
                if key not in compiled:
                    compiled[key] = machine_code(kernel, arguments, options, target)
                got = compiled[key]
                problems = check(name, target, dtype, arguments, options, got)
                failed |= bool(problems)
                held.add(gate(name, dtype))
                print(f"{target:7}{dtype:5}{name:38}", " ".join(f"{k} {v}" for k, v in got.items()),
                      *(["FAILED:", "; ".join(problems)] if problems else []), flush=True)
    if args.dtypes == ",".join(DTYPES) and held != set(GATES):
        print("FAILED: rows that hold nothing:", set(GATES) - held)
        failed = True
    return failed


if __name__ == "__main__":
    sys.exit(main())
