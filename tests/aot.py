"""Ahead-of-time gate of kernels/, no GPU needed: python tests/aot.py [--targets 90,gfx942] [--dtypes bf16]

The public functions run on CPU tensors that claim to be on a GPU, and each launch is recorded, not made: what
is compiled here is what is launched there (argument types, alignment, constants, warps). Every kernel is
compiled for every target, and its machine code must have no stack, no local memory, no spills, all 128-bit
global accesses that its tile allows, and stay under the ceilings of one table. Prints a line a kernel; exit
status 1 if one fails.
"""
import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import triton  # before kernels: then they define their kernels though there is no GPU
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import diffuse, group_norm, noise  # noqa: E402

TARGETS = {"80": GPUTarget("cuda", 80, 32), "90": GPUTarget("cuda", 90, 32),
           "100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
         torch.int64: "*i64", torch.bool: "*i1"}

# Tile-sized streams that must be read and written 128 bits at a time, each by its type: e that of the case,
# 4 fp32; then ceilings for NVIDIA (worst of three targets and three types): registers, and instructions per
# value of the tile, all of the program counted (None: it loops over something else). On AMD: 128 registers,
# for 16 wavefronts to fit, and no accesses counted: a wavefront of 64 leaves fewer values to each thread.
GATES = {
    "forward_kernel 0 nchw": ("e", "e", 64, 20),
    "forward_kernel 0 last": ("e", "e", 72, 21),
    "forward_kernel 0 largest": ("e", "e", 144, 19),
    "forward_kernel 0 odd": ("", "", 40, 23),
    "forward_kernel 1 nchw large": ("e", "", 48, 8),
    "forward_kernel 1 last large": ("e", "", 56, 9),
    "forward_kernel 2 nchw large": ("e", "e", 48, 16),
    "forward_kernel 2 last large": ("e", "e", 64, 17),
    "combine_kernel nchw large": ("", "", 24, None),
    "combine_kernel last large": ("", "", 24, None),
    "backward_kernel 0 nchw": ("ee", "e", 96, 32),
    "backward_kernel 0 last": ("ee", "e", 112, 37),
    "backward_kernel 0 largest": ("ee", "e", 128, 35),
    "backward_kernel 0 odd": ("", "", 56, 44),
    "backward_kernel 1 nchw large": ("ee", "", 48, 25),
    "backward_kernel 1 last large": ("ee", "", 88, 31),
    "backward_kernel 2 nchw large": ("ee", "e", 80, 25),
    "backward_kernel 2 last large": ("ee", "e", 80, 27),
    "forward_kernel 0 groups last": ("e", "e", 72, 23),
    "forward_kernel 1 groups last large": ("e", "", 56, 9),
    "forward_kernel 2 groups last large": ("e", "e", 64, 17),
    "backward_kernel 0 groups last": ("ee", "e", 128, 35),
    "backward_kernel 1 groups last large": ("ee", "", 88, 30),
    "backward_kernel 2 groups last large": ("ee", "e", 98, 27),
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


def recorded(call):
    """[(kernel, arguments, options)] of the launches that `call` would make on a GPU; outputs stay unset."""
    launches, jit = [], triton.runtime.jit.JITFunction

    def record(kernel, *args, grid, warmup, **options):
        named = {k: options.pop(k) for k in list(options) if k in kernel.arg_names}
        launches.append((kernel, inspect.signature(kernel.fn).bind(*args, **named).arguments, options))

    run, jit.run = jit.run, record
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        call()
    finally:
        jit.run = run
        del torch.Tensor.is_cuda
    return launches


def cases(dtype):
    """{name in GATES: (kernel, arguments, options)} of each kernel in each of its forms."""
    found = {}

    def take(case, call):
        for kernel, arguments, options in recorded(call):
            stage = [str(arguments["STAGE"])] if "STAGE" in arguments else []
            found[" ".join([kernel.fn.__name__.strip("_"), *stage, case])] = kernel, arguments, options

    def norm(shape, groups, layout=torch.contiguous_format, adaptive=True):
        n, c = shape[:2]
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        weight, bias = torch.ones(2, c, requires_grad=True).unbind()
        scale, shift = torch.zeros(n, 2 * c, dtype=dtype).chunk(2, 1) if adaptive else (None, None)
        group_norm.group_norm(x, groups, weight, bias, scale, shift).backward(torch.zeros_like(x))

    take("nchw", lambda: norm((2, 128, 32, 32), 32))  # CIFAR-10 at width 128
    take("last", lambda: norm((2, 256, 16, 16), 32, torch.channels_last))
    take("largest", lambda: norm((2, 32, 32, 32), 2))  # a group of TILE values
    take("nchw large", lambda: norm((2, 64, 128, 128), 16))
    take("last large", lambda: norm((2, 128, 64, 64), 8, torch.channels_last))
    take("groups last", lambda: norm((16, 128, 16, 16), 32, torch.channels_last))
    take("groups last large", lambda: norm((16, 64, 128, 128), 16, torch.channels_last))
    take("odd", lambda: norm((2, 24, 7, 7), 8, adaptive=False))  # 3 x 49 values: masks everywhere

    images, out, state = (torch.zeros(2, 3, 32, 32, dtype=t) for t in (torch.uint8, dtype, torch.float32))
    a, coef, seed, step = torch.rand(2), torch.rand(5), torch.tensor(3), torch.tensor(4)
    noises, last = torch.empty(2, 3072, dtype=dtype), out.contiguous(memory_format=torch.channels_last)
    take("ints", lambda: noise._randn_triton(noises, 5, 0, 0, 0))
    take("tensors", lambda: noise._randn_triton(noises, seed, torch.arange(2), step, 2))
    take("uint8 flipped", lambda: diffuse.add_noise(images, a, a, 5, flip=a > 0.5))
    take("uint8 alone", lambda: diffuse.add_noise(images, a, a, 5, return_eps=False))
    take("float", lambda: diffuse.add_noise(out, a, a, seed, step=step))
    take("last", lambda: diffuse.add_noise(last, a, a, 5))
    take("plain", lambda: diffuse.denoise_step(state, out, coef, 5, step=3))
    take("guided", lambda: diffuse.denoise_step(state, out, coef, seed, step=step, out_uncond=out.clone(),
                                                guidance=2.0, clip=True, std=state, return_x0=True))
    take("mixed", lambda: diffuse.denoise_step(state, last, coef, seed, step=step, clip=True))  # as a U-Net leaves it
    out.requires_grad_()
    take("clipped", lambda: diffuse.denoise_step(state, out, coef, 5, clip=True).backward(state))

    names = {k.fn.__name__ for k, _, _ in found.values()}
    kernels = {f.fn.__name__ for module in (noise, diffuse, group_norm) for f in vars(module).values()
               if isinstance(f, triton.runtime.jit.JITFunction) and f.fn.__name__.endswith("_kernel")}
    assert names == kernels, f"kernels that no case launches: {kernels - names}"
    return found


def source(kernel, arguments):
    """The ASTSource of Triton's own launcher: None and 1 become constants, multiples of 16 are marked."""
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = arguments[param.name]
        kind = type(value)
        free = param.do_not_specialize
        if param.is_constexpr or value is None or (kind is int and value == 1 and not free):
            signature[param.name], constants[i,] = "constexpr", value
            continue
        number = value
        if kind is torch.Tensor:
            signature[param.name], number = TYPES[value.dtype], value.data_ptr()
        else:
            signature[param.name] = {float: "fp32", bool: "u1"}.get(kind, "i32")
        if kind not in (float, bool) and number % 16 == 0 and not free:
            attrs[i,] = [["tt.divisibility", 16]]  # without it loads are compiled narrow
    return ASTSource(kernel, signature, constants, attrs)


def read_nvidia(cubin):
    """What the machine code holds: registers, bytes of stack and local memory, 128-bit accesses, ..."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", "--dump-sass", str(path)], capture_output=True,
                              text=True, check=True).stdout
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.M)
    count = lambda test: sum(bool(re.match(test, op)) for op in code)
    stack, local = (int(re.search(key + r":(\d+)", text)[1]) for key in ("STACK", "LOCAL"))
    return dict(registers=int(re.search(r"REG:(\d+)", text)[1]), memory=stack + local,
                spills=count("LDL|STL"), instructions=len(code) - count("NOP|BRA$"),
                loads=count(r"LDG.*\.128"), stores=count(r"STG.*\.128"))


def read_amd(text):
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
    return dict(registers=number("vgpr_count"), memory=number("private_segment_fixed_size"),
                spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
                instructions=len(re.findall(r"^\s+(?:[sv]|ds|global|buffer)_\w+", text, re.M)),
                loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
                stores=len(re.findall(r"(?:global|buffer)_store_dwordx4", text)))


def check(name, target, dtype, arguments, options, got):
    """The complaints about one compiled kernel, [] if it passes."""
    read, written, registers, per_value = GATES.get(f"{name} {dtype}", GATES[name])
    problems = [f"{key} = {got[key]}" for key in ("memory", "spills") if got[key]]
    nvidia = TARGETS[target].backend == "cuda"
    if got["registers"] > (registers if nvidia else 128):
        problems.append(f"registers over {registers if nvidia else 128}")
    if nvidia:
        get = lambda key: arguments.get(key, 0)
        tile = get("TILE") or 4 * get("QUADS") or get("BG") * get("BC") * get("BP")
        values = tile // (32 * options.get("num_warps", 4))
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
            built = source(kernel, arguments)
            for target in args.targets.split(","):
                key = (built.hash(), str(options), target)
                if key in seen:
                    continue
                seen.add(key)
                # Code that asks for its target (target_info.is_cuda) must hear this one, not "no driver".
                triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS[target]))
                code = triton.compile(built, target=TARGETS[target], options=options).asm
                got = read_nvidia(code["cubin"]) if "cubin" in code else read_amd(code["amdgcn"])
                problems = check(name, target, dtype, arguments, options, got)
                failed |= bool(problems)
                print(f"{target:7}{dtype:5}{name:33}", " ".join(f"{k} {v}" for k, v in got.items()),
                      *(["FAILED:", "; ".join(problems)] if problems else []), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
