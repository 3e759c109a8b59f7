"""Ahead-of-time gate of kernels/, no GPU needed: python tests/aot.py [--targets 90,gfx942] [--dtypes bf16]

The public functions run on CPU tensors that claim to be on a GPU, and each launch is recorded, not made: what
is compiled here is what is launched there (argument types, alignment, constants, warps). Every kernel is
compiled for every target, and its machine code must have no stack, no local memory, no spills, all 128-bit
global accesses that its tile allows, and stay under the ceilings of one table. Prints a line a kernel; exit
status 1 if one fails.
"""
import argparse
import sys
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.bench import DTYPES, TARGETS, cases, machine_code, source, tile_per_thread  # noqa: E402

# Tile-sized streams that must be read and written 128 bits at a time, each by its type: e that of the case,
# 4 fp32; then ceilings for NVIDIA (worst of three targets and three types): registers, and instructions per
# value of the tile, all of the program counted (None: it loops over something else). On AMD: 128 registers,
# for 16 wavefronts to fit, and no accesses counted: a wavefront of 64 leaves fewer values to each thread.
GATES = {
    "forward_kernel 0 nchw": ("e", "e", 64, 18),
    "forward_kernel 0 last": ("e", "e", 68, 18),
    "forward_kernel 0 largest": ("e", "e", 140, 17),
    "forward_kernel 0 odd": ("", "", 36, 22),
    "forward_kernel 1 nchw large": ("e", "", 48, 8),
    "forward_kernel 1 last large": ("e", "", 56, 9),
    "forward_kernel 2 nchw large": ("e", "e", 48, 14),
    "forward_kernel 2 last large": ("e", "e", 68, 14),
    "combine_kernel nchw large": ("", "", 24, None),
    "combine_kernel last large": ("", "", 24, None),
    "backward_kernel 0 nchw": ("ee", "e", 96, 29),
    "backward_kernel 0 last": ("ee", "e", 100, 34),
    "backward_kernel 0 largest": ("ee", "e", 128, 35),
    "backward_kernel 0 odd": ("", "", 52, 41),
    "backward_kernel 1 nchw large": ("ee", "", 48, 23),
    "backward_kernel 1 last large": ("ee", "", 92, 27),
    "backward_kernel 2 nchw large": ("ee", "e", 80, 22),
    "backward_kernel 2 last large": ("ee", "e", 80, 24),
    "forward_kernel 0 groups last": ("e", "e", 72, 20),
    "forward_kernel 1 groups last large": ("e", "", 56, 9),
    "forward_kernel 2 groups last large": ("e", "e", 68, 14),
    "backward_kernel 0 groups last": ("ee", "e", 128, 32),
    "backward_kernel 1 groups last large": ("ee", "", 92, 27),
    "backward_kernel 2 groups last large": ("ee", "e", 104, 24),
    "combine_kernel groups last large": ("", "", 24, None),
    "parameters_kernel groups last": ("", "", 80, None),
    "parameters_kernel groups last large": ("", "", 80, None),
    "parameters_kernel nchw": ("", "", 80, None),
    "parameters_kernel last": ("", "", 80, None),
    "parameters_kernel largest": ("", "", 56, None),
    "parameters_kernel nchw large": ("", "", 56, None),
    "parameters_kernel last large": ("", "", 56, None),
    "parameters_kernel odd": ("", "", 56, None),
    "randn_kernel ints fp32": ("", "e", 40, 30),
    "randn_kernel ints": ("", "e", 40, 31),
    "randn_kernel tensors": ("", "e", 44, 31),
    "add_noise_kernel uint8 flipped": ("", "44", 48, 41),
    "add_noise_kernel uint8 alone": ("", "4", 48, 41),
    "add_noise_kernel float": ("e", "ee", 48, 37),
    "add_noise_kernel last": ("", "", 104, 64),
    "denoise_kernel plain": ("4e", "4", 64, 42),
    "denoise_kernel guided": ("4ee4", "44", 80, 54),
    "denoise_kernel clipped": ("4e", "4", 64, 44),
    "denoise_kernel mixed": ("4", "4", 78, 54),
    "denoise_backward_kernel clipped": ("44e", "e", 40, 15),
}


def check(name, target, dtype, arguments, options, got):
    """The complaints about one compiled kernel, [] if it passes."""
    read, written, registers, per_value = GATES.get(f"{name} {dtype}", GATES[name])
    problems = [f"{key} = {got[key]}" for key in ("memory", "spills") if got[key]]
    nvidia = TARGETS[target].backend == "cuda"
    if got["registers"] > (registers if nvidia else 128):
        problems.append(f"registers over {registers if nvidia else 128}")
    if nvidia:
        values = tile_per_thread(arguments, options)
        size = {"e": DTYPES[dtype].itemsize, "4": 4}
        for key, streams in (("loads", read), ("stores", written)):
            need = sum(values * size[s] // 16 for s in streams)
            if got[key] < need:
                problems.append(f"128-bit {key} under {need}")
        slack = 1 if triton.__version__ >= "3.7" else 1.15  # the table is of Triton 3.7
        if per_value and got["instructions"] > slack * per_value * values:
            problems.append(f"instructions over {per_value} x {values}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    args = parser.parse_args()
    failed, seen = False, set()
    for dtype in args.dtypes.split(","):
        for name, (kernel, arguments, options) in cases(DTYPES[dtype]).items():
            for target in args.targets.split(","):
                key = (source(kernel, arguments).hash(), str(options), target)
                if key in seen:
                    continue
                seen.add(key)
                got = machine_code(kernel, arguments, options, target)
                problems = check(name, target, dtype, arguments, options, got)
                failed |= bool(problems)
                print(f"{target:7}{dtype:5}{name:33}", " ".join(f"{k} {v}" for k, v in got.items()),
                      *(["FAILED:", "; ".join(problems)] if problems else []), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
