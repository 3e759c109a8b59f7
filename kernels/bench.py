"""python -m kernels.bench: are the kernels right, what do they cost, and how near are they to the
memory limit?

With a GPU: the kernels are first compared with their plain-PyTorch twins; then timed, median of
cold runs (the L2 cache is overwritten before each, inputs are made outside the timer), beside eager
PyTorch, torch.compile and, where installed, Liger's GroupNorm, latentCall145's for channels_last
(gnnhwc, which builds itself with nvcc) and diffusers' DDIM step, over every shape of the shipped
U-Nets; "held" is our own backward without its steps. Then training and sampling as a whole. Writes
bench.md.
Without one: the static counts of each kernel (bytes, instructions, registers) for each target,
compiled ahead of time. Not timed.
"""
import argparse
import contextlib
import datetime
import importlib.util
import inspect
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

try:
    import triton  # before the kernels: then they are defined though there be no GPU
except ImportError:
    sys.exit("kernels.bench needs Triton: pip install triton (there is none for macOS and Windows)")
import torch
import torch.nn.functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common import gpu, sampling
from common.unet import UNet
from kernels import diffuse, group_norm, noise

LAST = torch.channels_last
TARGETS = {"80": GPUTarget("cuda", 80, 32), "90": GPUTarget("cuda", 90, 32),
           "100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
         torch.uint8: "*u8", torch.int64: "*i64", torch.bool: "*i1"}


# ---------------------------------------------------------------------- machine code, without a GPU
def recorded(call):
    """[(kernel, arguments, options)] of the launches that `call` would make on a GPU;
    outputs stay unset."""
    launches, jit = [], triton.runtime.jit.JITFunction

    def record(kernel, *args, grid, warmup, **options):
        named = {k: options.pop(k) for k in list(options) if k in kernel.arg_names}
        launches.append(
            (kernel, inspect.signature(kernel.fn).bind(*args, **named).arguments, options))

    run, jit.run = jit.run, record
    torch.Tensor.is_cuda = property(lambda self: True)
    try:
        call()
    finally:
        jit.run = run
        del torch.Tensor.is_cuda
    return launches


def cases(dtype):
    """{name: (kernel, arguments, options)} of each kernel in each of its forms."""
    found = {}

    def take(case, call):
        for kernel, arguments, options in recorded(call):
            stage = [str(arguments["STAGE"])] if "STAGE" in arguments else []
            found[" ".join([kernel.fn.__name__.strip("_"), *stage, case])] = (
                kernel, arguments, options)

    def norm(shape, groups, layout=torch.contiguous_format, adaptive=True):
        n, c = shape[:2]
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        weight, bias = torch.ones(2, c, requires_grad=True).unbind()
        scale, shift = torch.zeros(n, 2 * c, dtype=dtype).chunk(2, 1) if adaptive else (None, None)
        group_norm.group_norm(x, groups, weight, bias, scale, shift).backward(torch.zeros_like(x))

    take("nchw", lambda: norm((2, 128, 32, 32), 32))  # CIFAR-10 at width 128
    take("last", lambda: norm((2, 256, 16, 16), 32, LAST))
    take("largest", lambda: norm((2, 32, 32, 32), 2))  # a group of TILE values
    take("nchw large", lambda: norm((2, 64, 128, 128), 16))
    take("last large", lambda: norm((2, 128, 64, 64), 8, LAST))
    take("groups last", lambda: norm((16, 128, 16, 16), 32, LAST))  # several groups in a tile
    take("groups last large", lambda: norm((16, 64, 128, 128), 16, LAST))
    # whose rows need two groups to fill 64 bytes
    take("deep last", lambda: norm((64, 128, 32, 32), 32, LAST))  # taken in steps backward
    take("wide last", lambda: norm((64, 512, 8, 8), 32, LAST))
    take("one last", lambda: norm((64, 32, 16, 16), 32, LAST))  # a channel a group
    # in 16 bits rows of 8 bytes, so split
    take("narrow last", lambda: norm((8, 128, 64, 64), 32, LAST))
    take("odd", lambda: norm((2, 24, 7, 7), 8, adaptive=False))  # 3 x 49 values: masks everywhere

    images, out, state = (torch.zeros(2, 3, 32, 32, dtype=t)
                          for t in (torch.uint8, dtype, torch.float32))
    a, coef, seed, step = torch.rand(2), torch.rand(5), torch.tensor(3), torch.tensor(4)
    noises, last = torch.empty(2, 3072, dtype=dtype), out.contiguous(memory_format=LAST)
    take("ints", lambda: noise._randn_triton(noises, 5, 0, 0, 0))
    take("tensors", lambda: noise._randn_triton(noises, seed, torch.arange(2), step, 2))
    take("uint8 flipped", lambda: diffuse.add_noise(images, a, a, 5, flip=a > 0.5))
    take("uint8 alone", lambda: diffuse.add_noise(images, a, a, 5, return_eps=False))
    take("float", lambda: diffuse.add_noise(out, a, a, seed, step=step))
    take("last", lambda: diffuse.add_noise(last, a, a, 5))
    take("plain", lambda: diffuse.denoise_step(state, out, coef, 5, step=3))
    take("guided", lambda: diffuse.denoise_step(
        state, out, coef, seed, step=step, out_uncond=out.clone(), guidance=2.0, clip=True,
        std=state.clone(), return_x0=True))
    # as a U-Net leaves it
    take("mixed", lambda: diffuse.denoise_step(state, last, coef, seed, step=step, clip=True))
    out.requires_grad_()
    take("clipped", lambda: diffuse.denoise_step(
        state, out, coef, 5, clip=True).backward(state.clone()))

    names = {k.fn.__name__ for k, _, _ in found.values()}
    kernels = {f.fn.__name__
               for module in (noise, diffuse, group_norm) for f in vars(module).values()
               if isinstance(f, triton.runtime.jit.JITFunction)
               and f.fn.__name__.endswith("_kernel")}
    assert names == kernels, f"kernels that no case launches: {kernels - names}"
    return found


def source(kernel, arguments):
    """The ASTSource of Triton's own launcher: None and 1 become constants, multiples of 16 are
    marked."""
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


def machine_code(kernel, arguments, options, target):
    """What the code compiled for that target holds: registers, bytes of stack and local memory,
    128-bit accesses, ... And `torn`: sums along an axis whose lanes are not neighbours in the warp,
    for which Triton (3.6, 3.7) shuffles between the wrong ones."""
    # Code that asks for its target (target_info.is_cuda) must hear this one, not "no driver".
    driver = SimpleNamespace(get_current_target=lambda: TARGETS[target])
    triton.runtime.driver.set_active(driver)
    code = triton.compile(source(kernel, arguments), target=TARGETS[target], options=options).asm
    return ((read_nvidia(code["cubin"]) if "cubin" in code else read_amd(code["amdgcn"]))
            | dict(torn=torn(code["ttgir"])))


def torn(text):
    """How many reductions in Triton's GPU dialect are along an axis that moves with lanes (bits of
    a lane's number) like 0, 2, 3."""
    lanes = {name: literal_eval(bits) for name, bits in re.findall(
        r"^(#\w+) = #ttg\.linear<\{.*?lane = (\[\[.*?\]\])", text, re.M)}
    found = 0
    for axis, layout in re.findall(
            r'"tt\.reduce"\(.*?axis = (\d+).*?\}\) : \(tensor<\d[^#]*(#.*?)>\) ->', text, re.S):
        # of slices, the outermost first
        dropped = [int(d) for d in re.findall(r"dim = (\d+)", layout)]
        axis = int(axis)
        for d in dropped:
            axis += axis >= d
        # others are blocks: never torn
        moves = [i for i, bit in enumerate(lanes.get(re.findall(r"#\w+", layout)[-1], ()))
                 if bit[axis]]
        found += bool(moves) and moves[-1] - moves[0] + 1 > len(moves)
    return found


def read_nvidia(cubin):
    """The counts of machine_code from a compiled NVIDIA kernel, by the disassembler that comes
    with Triton."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", "--dump-sass", str(path)],
                              capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.M)
    count = lambda test: sum(bool(re.match(test, op)) for op in code)
    stack, local = (int(re.search(key + r":(\d+)", text)[1]) for key in ("STACK", "LOCAL"))
    return dict(registers=int(re.search(r"REG:(\d+)", text)[1]), memory=stack + local,
                spills=count("LDL|STL"), instructions=len(code) - count("NOP|BRA$"),
                loads=count(r"LDG.*\.128"), stores=count(r"STG.*\.128"))


def read_amd(text):
    """The same from AMD's assembly text; registers are a thread's vector registers."""
    number = lambda key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
    return dict(registers=number("vgpr_count"), memory=number("private_segment_fixed_size"),
                spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
                instructions=len(re.findall(r"^\s+(?:[sv]|ds|global|buffer)_\w+", text, re.M)),
                loads=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
                stores=len(re.findall(r"(?:global|buffer)_store_dwordx4", text)))


def tile_per_thread(arguments, options, warp=32):
    """Values of a program's tile for each of its threads."""
    get = lambda key: arguments.get(key, 0)
    tile = get("TILE") or 4 * get("QUADS") or get("BG") * get("BC") * get("BP")
    tile *= arguments.get("LOOPS", 1)
    return tile // (warp * options.get("num_warps", 4))


def static_table(dtypes, targets):
    """Lines of a table: of every kernel the bytes, for each value, of the tensors it touches, and
    what its machine code holds."""
    # statistics: given the output, not touching it
    idle = {"forward_kernel 1": "y_ptr", "backward_kernel 1": "dx_ptr"}
    lines = ["Not timed: there is no GPU here. "
             f"Compiled ahead of time by Triton {triton.__version__}.", "",
             "| kernel | type | bytes of the tensors it touches per value | "
             + " | ".join(f"{t}: registers, instructions per value" for t in targets) + " |",
             "| --- | --- | --- | " + "--- | " * len(targets)]
    for dtype in dtypes:
        for name, (kernel, arguments, options) in cases(DTYPES[dtype]).items():
            tensors = {t.data_ptr(): t for key, t in arguments.items()
                       if isinstance(t, torch.Tensor)
                       and key != idle.get(" ".join(name.split()[:2]))}.values()
            values = max(t.numel() for t in tensors)
            size = sum(t.numel() * t.element_size() for t in tensors) / values
            cells = []
            for target in targets:
                got = machine_code(kernel, arguments, options, target)
                each = tile_per_thread(arguments, options, 64 if target.startswith("gfx") else 32)
                per_value = (f"{got['instructions'] / each:.1f}"
                             if each and not name.startswith(("comb", "param")) else "-")
                cells.append(f"{got['registers']}, {per_value}"
                             + (", SPILLS" if got["memory"] or got["spills"] else ""))
            lines.append(f"| {name} | {dtype} | {size:.1f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


# ------------------------------------------------------------------------------------------- timing
UNETS = {  # the shipped networks, and the batch they train with
    "digits": (dict(in_channels=1, size=16, width=32, multipliers=(1, 2, 2), blocks=1,
                    attention=()), 64),
    "cifar10": (dict(in_channels=3, size=32, width=128, multipliers=(1, 2, 2, 2), blocks=2,
                     attention=(16,)), 128),
    "latent": (dict(in_channels=4, size=32, width=128, multipliers=(1, 2, 2), blocks=2,
                    attention=(16,)), 64),
    "256": (dict(in_channels=3, size=256, width=64, multipliers=(1, 1, 2, 2, 4, 4), blocks=2,
                 attention=(16,)), 8),
}


def norm_shapes(options, batch):
    """{((N, C, H, W), groups, adaptive, silu)} of every GroupNorm in a U-Net, in order, by running
    it on tensors without data."""
    found = {}

    def note(module, args):
        found[tuple(args[0].shape), module.groups, len(args) > 1, module.silu] = True
    with torch.device("meta"):
        net = UNet(**options)
        for module in net.modules():
            if isinstance(module, group_norm.GroupNorm):
                module.register_forward_pre_hook(note)
        side = options["size"]
        net(torch.empty(batch, options["in_channels"], side, side), torch.empty(batch))
    return found


def eager_norm(x, groups, weight, bias, scale, shift, silu):
    """GroupNorm as most repositories write it."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype))
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


def eager_add_noise(x0, a, s):
    """Noising as most repositories write it: (x_t, eps) of x0 (B, C, H, W), a, s (B,)."""
    x = x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0
    eps = torch.randn_like(x)
    return a[:, None, None, None] * x + s[:, None, None, None] * eps, eps


def eager_denoise(x, out, coef):
    """The update with clipped x0, an operator at a time; coef (5,) as in denoise_step."""
    p_x, p_out, c_x, c_0, c_n = coef
    x0 = (p_x * x + p_out * out).clamp(-1, 1)
    return c_x * x + c_0 * x0 + c_n * torch.randn_like(x)


class Clock:
    """ms of a call, median; on a GPU by its own events with a cold L2 cache, on a CPU by the wall
    clock."""

    def __init__(self, device, repeats=30):
        self.device, self.repeats = torch.device(device), repeats
        self.cuda = self.device.type == "cuda"
        self.flush = torch.empty(2 ** 28 if self.cuda else 0, dtype=torch.uint8, device=device)

    def ms(self, call, cold=True):
        for _ in range(3):
            call()
        times = []
        for _ in range(self.repeats):
            if not self.cuda:
                start = time.perf_counter()
                call()
                times.append(1000 * (time.perf_counter() - start))
                continue
            if cold:
                self.flush.zero_()
                # 1 ms: launches queue up behind it, so that a kernel's time is not Python's
                torch.cuda._sleep(2_000_000)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)


def copy_speed(clock):
    """GB/s of a copy, 256 MB read and as many written: what nothing that moves memory can beat by
    much."""
    x = torch.empty(2 ** 26 if clock.cuda else 2 ** 22, device=clock.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / clock.ms(lambda: y.copy_(x)) / 1e6


def compare(name, ways, size, clock, copy):
    """One row: for each way its ms; for the first, ours, GB/s of the fewest bytes and the share of
    the copy's speed."""
    ms = {}
    for way, call in ways.items():
        try:
            ms[way] = clock.ms(call)
        except Exception as fault:
            print(f"{name}, {way}: {type(fault).__name__} {' '.join(str(fault).split())[:100]}",
                  file=sys.stderr)
            ms[way] = math.nan
    ours = ms["ours"]
    row = dict(name=name, **ms, gbs=size / ours / 1e6, share=size / ours / 1e6 / copy)
    print(f"{name:58} {ours:8.4f} ms {row['gbs']:7.0f} GB/s {row['share']:5.0%} of copy"
          + "".join(f"  {way} x{t / ours:.2f}" for way, t in ms.items() if way != "ours"),
          flush=True)
    return row


def built_norm():
    """latentCall145's GroupNorm f(x, weight, bias, groups, eps, activation), 2 for SiLU and 0 for
    none, all of one dtype and x in channels_last; None, and why, where it does not build."""
    if importlib.util.find_spec("gnnhwc") is None:
        return None
    try:
        from gnnhwc.custom_gn import GN_NHWC_Func
    except Exception as fault:
        print(f"no column of gnnhwc: {type(fault).__name__} {' '.join(str(fault).split())[:100]}",
              file=sys.stderr)
        return None
    return GN_NHWC_Func.apply


def in_steps(x, groups):
    """Whether the backward kernel takes such an x in steps."""
    tiles, _, chunks, _ = group_norm._tiles(x, groups, 16)
    return chunks == 1 and group_norm._in_steps(tiles, x.element_size())["LOOPS"] > 1


def held(call):
    """call() with tiles held whole instead."""
    with mock.patch.object(group_norm, "_in_steps", lambda tiles, e: dict(tiles, LOOPS=1)):
        return call()


def alike(ours, others):
    """Whether y and dx are the same to a twentieth of their largest value."""
    return all((a - b).abs().max() <= 0.05 * a.abs().max() for a, b in zip(ours, others))


def norm_rows(clock, copy, dtypes, unets, compiled=True, layouts=(torch.contiguous_format, LAST),
              batch=None):
    """Forward and backward of every GroupNorm shape, in both layouts if not told otherwise."""
    gnnhwc = built_norm()
    shapes = [shape for unet in unets
              for shape in norm_shapes(UNETS[unet][0], batch or UNETS[unet][1])]
    each = itertools.product(dict.fromkeys(shapes), dtypes, layouts)
    for (shape, groups, adaptive, silu), dtype, layout in each:
        yield from norm_pair(clock, copy, shape, groups, adaptive, silu, dtype, layout, compiled,
                             gnnhwc)


def norm_pair(clock, copy, shape, groups, adaptive, silu, dtype, layout, compiled, gnnhwc):
    """The rows of one GroupNorm, forward and backward: ours beside whatever takes its arguments."""
    n, c = shape[:2]
    name = (f"{'x'.join(map(str, shape))} /{groups} {str(dtype)[6:]} "
            f"{'last' if layout is LAST else 'nchw'}")
    name += " scale, shift" * adaptive + " linear" * (not silu)
    x = torch.randn(shape, device=clock.device, dtype=dtype).contiguous(memory_format=layout)
    weight, bias = torch.ones(2, c, device=clock.device).unbind()
    scale, shift = (torch.randn(n, 2 * c, device=clock.device, dtype=dtype).chunk(2, 1)
                    if adaptive else (None, None))
    dy = torch.randn_like(x)
    functions = dict(ours=group_norm.group_norm, eager=eager_norm)
    if compiled:
        torch._dynamo.reset()  # else the ninth shape would silently run eagerly
        functions["compile"] = torch.compile(eager_norm, dynamic=False)
    if gnnhwc and layout is LAST and not adaptive:
        functions["gnnhwc"] = lambda x, groups, weight, bias, *none, silu: gnnhwc(
            x, weight, bias, groups, 1e-5, 2 * silu)
    calls, back, found = {}, {}, {}
    for way, f in functions.items():
        # gnnhwc takes weights of x's type alone
        plain = [v if v is None else v.to(dtype if way == "gnnhwc" else v.dtype)
                 for v in (x, weight, bias, scale, shift)]
        given = [v if v is None else v.detach().requires_grad_() for v in plain]
        calls[way] = lambda f=f, v=plain: f(v[0], groups, *v[1:], silu=silu)
        try:
            y = f(given[0], groups, *given[1:], silu=silu)
        except Exception:  # told by compare
            continue
        wanted = [v for v in given if v is not None]
        back[way] = lambda y=y, w=wanted: torch.autograd.grad(y, w, dy, retain_graph=True)
        if way in ("ours", "gnnhwc"):
            found[way] = y.detach(), back[way]()[0]
    if "gnnhwc" in found and not alike(found["ours"], found["gnnhwc"]):
        print(f"{name}: gnnhwc computes something else, and is left out", file=sys.stderr)
        del calls["gnnhwc"], back["gnnhwc"]
    if in_steps(x, groups):
        back["held"] = lambda ours=back["ours"]: held(ours)
    if not adaptive and not silu and layout is not LAST:  # all that Liger's takes
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers.functional import liger_group_norm
            calls["liger"] = lambda: liger_group_norm(x.view(n, c, -1), weight, bias, c, groups,
                                                      1e-5)
    size = x.numel() * x.element_size()
    yield compare(f"group_norm {name}", calls, 2 * size, clock, copy)
    yield compare(f"group_norm backward {name}", back, 3 * size, clock, copy)


def diffuse_rows(clock, copy, dtypes, compiled=True):
    """Noise, noising and the update, at the U-Nets' picture sizes and at 256 MB."""
    shapes = [(batch, u["in_channels"], u["size"], u["size"]) for u, batch in UNETS.values()]
    for shape in [*shapes, (1024 if clock.cuda else 16, 4, 128, 128)]:
        a, s = torch.rand(2, shape[0], device=clock.device).unbind()
        coef = torch.rand(5, device=clock.device)
        seed, step = torch.tensor(3, device=clock.device), torch.tensor(5, device=clock.device)
        for dtype in dtypes:
            x, out = (torch.randn(shape, device=clock.device, dtype=t)
                      for t in (torch.float32, dtype))
            pixels = torch.randint(0, 256, shape, device=clock.device, dtype=torch.uint8)
            e, name = dtype.itemsize, f"{'x'.join(map(str, shape))} {str(dtype)[6:]}"

            def versions(ours, eager, *arguments):
                ways = dict(ours=ours, eager=lambda: eager(*arguments))
                if compiled:
                    torch._dynamo.reset()  # as above
                    f = torch.compile(eager, dynamic=False)
                    ways["compile"] = lambda: f(*arguments)
                return ways

            yield compare(
                f"randn {name}",
                versions(lambda: noise.randn(shape, seed, step=step, dtype=dtype,
                                             device=clock.device),
                         lambda: torch.randn(shape, dtype=dtype, device=clock.device)),
                e * x.numel(), clock, copy)
            if dtype == torch.float32:
                yield compare(
                    f"add_noise uint8 {name}",
                    versions(lambda: diffuse.add_noise(pixels, a, s, seed, step=step),
                             eager_add_noise, pixels, a, s),
                    9 * x.numel(), clock, copy)
            yield compare(
                f"add_noise {name}",
                versions(lambda: diffuse.add_noise(out, a, s, seed, step=step),
                         eager_add_noise, out, a.to(dtype), s.to(dtype)),
                3 * e * x.numel(), clock, copy)
            ways = versions(lambda: diffuse.denoise_step(x, out, coef, seed, step=step, clip=True),
                            eager_denoise, x, out, coef)
            with contextlib.suppress(ImportError):
                from diffusers import DDIMScheduler
                scheduler = DDIMScheduler()
                scheduler.set_timesteps(50)
                ways["diffusers"] = lambda: scheduler.step(out.float(), 500, x, eta=1.0)
            yield compare(f"denoise_step {name}", ways, (8 + e) * x.numel(), clock, copy)


def whole_rows(clock, unet="cifar10", batches=(16, 64, 128, 256)):
    """Updates of training and single steps of sampling, in pictures per second: ours, and the same
    loop in eager PyTorch."""
    options, _ = UNETS[unet]
    shape = (options["in_channels"], options["size"], options["size"])
    precision = torch.bfloat16 if clock.cuda else torch.float32

    def network(plain):
        torch.manual_seed(0)
        net = UNet(**options).to(clock.device).to(memory_format=LAST)
        for module in net.modules() if plain else ():
            if isinstance(module, group_norm.GroupNorm):
                module.forward = lambda x, scale=None, shift=None, m=module: eager_norm(
                    x, m.groups, m.weight, m.bias, scale, shift, m.silu)
        return net

    for batch in batches:
        a, s = torch.rand(2, batch, device=clock.device).unbind()
        coef, t = torch.rand(5, device=clock.device), torch.full((batch,), 0.5, device=clock.device)
        x0 = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=clock.device)
        x = torch.randn(batch, *shape, device=clock.device)
        ms = {}
        for way in ("ours", "eager"):
            net = network(way == "eager")
            optimizer = torch.optim.Adam(net.parameters(), 1e-4, **gpu.adam(clock.device))

            def train():
                x_t, eps = (diffuse.add_noise(x0, a, s, 1, step=2) if way == "ours"
                            else eager_add_noise(x0, a, s))
                with torch.autocast(clock.device.type, precision, enabled=clock.cuda):
                    out = net(x_t, t)
                optimizer.zero_grad(set_to_none=True)
                loss = (out.float() - eps).square().mean()
                loss.backward()
                optimizer.step()
                return dict(loss=loss)

            seed, i = torch.tensor(3, device=clock.device), torch.tensor(5, device=clock.device)

            @torch.no_grad()
            def sample(c, net, x, coef, i):
                with torch.autocast(clock.device.type, precision, enabled=clock.cuda):
                    out = net(x, t)
                return (diffuse.denoise_step(x, out, coef, seed, step=i, clip=True)
                        if way == "ours" else eager_denoise(x, out, coef))

            ms[way, "training"] = clock.ms(train, cold=False)
            ms[way, "sampling"] = clock.ms(lambda: sample(None, net, x, coef, i), cold=False)
            if way == "ours" and clock.cuda:  # by the scripts' own helpers
                c = SimpleNamespace(device=clock.device, graph=True)
                update = gpu.recorded(train, c)
                for _ in range(gpu.WARM + 1):
                    update()
                (graph, _, _), = update.graphs.values()
                if graph is not None:  # else why has been said
                    ms["captured", "training"] = clock.ms(update, cold=False)
                down = sampling.captured(sample, c, net)
                ms["captured", "sampling"] = clock.ms(lambda: down(x, coef, i), cold=False)
                (_, _, graph, _), = sampling._graphs.values()
                if graph is None:  # and why has been said
                    del ms["captured", "sampling"]
                sampling._graphs.clear()
        try:  # google/ddpm-cifar10-32's network; per network evaluation
            from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
            width, last = options["width"], len(options["multipliers"]) - 1
            blocks = ["AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(last + 1)]
            net = UNet2DModel(
                sample_size=shape[-1], in_channels=shape[0], out_channels=shape[0],
                layers_per_block=2, norm_num_groups=min(32, width // 4),
                block_out_channels=[width * m for m in options["multipliers"]],
                down_block_types=blocks,
                up_block_types=[b.replace("Down", "Up") for b in reversed(blocks)]).to(clock.device)
            pipe = DDIMPipeline(net, DDIMScheduler())
            pipe.set_progress_bar_config(disable=True)

            def pictures():
                # autocast, as above: in a bf16 network it fails where it makes NumPy arrays of bf16
                # pictures
                with torch.autocast(clock.device.type, precision, enabled=clock.cuda):
                    pipe(batch, num_inference_steps=5, output_type="pt")
            ms["diffusers", "sampling"] = clock.ms(pictures, cold=False) / 5
        except Exception as fault:
            print(f"{unet} batch {batch}, no row of diffusers: {type(fault).__name__} "
                  f"{' '.join(str(fault).split())[:100]}", file=sys.stderr)
        for (way, what), took in ms.items():
            ratio = f", x{ms['eager', what] / took:.2f} of eager PyTorch" if way != "eager" else ""
            each = "images/s" if what == "training" else "images/s for one step"
            line = (f"{what} {unet} batch {batch}, {way}: {1000 * batch / took:.0f} {each}, "
                    f"{took:.2f} ms{ratio}")
            print(line, flush=True)
            yield line


class Bare(torch.autograd.Function):
    """The least that PyTorch asks for around group_norm's launches: as many tensors taken and
    saved, nothing checked."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, silu, eps):
        y, stats = group_norm._forward(x, weight, bias, scale, shift, groups, silu, eps)
        ctx.save_for_backward(x, weight, bias, scale, shift, stats)
        return y


def overhead(clock, calls=300):
    """Python's time for one small group_norm call with gradients, as a multiple of a bare
    autograd.Function's with the same launches."""
    x, weight, bias = (torch.ones(s, device=clock.device, requires_grad=True)
                       for s in ((1, 8, 4, 4), 8, 8))
    scale, shift = torch.ones(1, 16, device=clock.device).chunk(2, 1)
    ways = {"group_norm": lambda: group_norm.group_norm(x, 2, weight, bias, scale, shift),
            "bare": lambda: Bare.apply(x, weight, bias, scale, shift, 2, True, 1e-5)}
    took = {way: [] for way in ways}
    for _ in range(3 + clock.repeats):  # in turn: whatever else the machine does meets both
        for way, f in ways.items():
            start = time.perf_counter()
            for _ in range(calls):
                f()
            took[way].append((time.perf_counter() - start) / calls)
            if clock.cuda:
                torch.cuda.synchronize()
    ours, bare = (statistics.median(t[3:]) for t in took.values())
    return (f"group_norm from Python: {1e6 * ours:.1f} us a call, x{ours / bare:.2f} of a bare "
            "autograd.Function with the same launches")


def check(device):
    """AssertionError unless GroupNorm, forward and backward, errs at most twice as much as its twin
    against the twin in float64, and noise, noising and the update, forward and backward, are what
    their twins compute on the CPU."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, LAST):
            for shape, groups in (((3, 32, 16, 16), 8), ((16, 64, 8, 8), 16),
                                  ((16, 256, 8, 8), 16), ((2, 64, 128, 128), 16),
                                  ((2, 24, 7, 5), 8), ((2, 32, 32, 32), 2), ((2, 64, 31, 33), 4),
                                  ((2, 128, 64, 32), 32)):  # the last three: in steps
                n, c = shape[:2]
                x = (torch.randn(shape, device=device) + 2).to(dtype).contiguous(
                    memory_format=layout)
                weight, bias, scale, shift = (torch.randn(k, device=device)
                                              for k in ((c,), (c,), (n, c), (n, c)))
                dy, found = torch.randn_like(x), []
                for f, kind in ((group_norm.group_norm, None), (group_norm.group_norm_torch, None),
                                (group_norm.group_norm_torch, torch.float64)):
                    given = [v.to(kind or v.dtype).detach().requires_grad_()
                             for v in (x, weight, bias, scale, shift)]
                    y = f(given[0], groups, *given[1:])
                    found.append([y, *torch.autograd.grad(y, given, dy.to(y.dtype))])
                for ours, plain, exact in zip(*found):
                    # the kernels' sigmoid of 16-bit x is right to 4e-7, and on a GPU the twin's is
                    # fp32's
                    floor = max(torch.finfo(ours.dtype).eps,
                                0 if dtype == torch.float32 else 1e-6) * exact.abs().max()
                    assert (ours - exact).abs().max() <= (
                        2 * (plain - exact).abs().max() + floor), (shape, dtype, layout)
        x, out = torch.randn(2, 4, 3, 32, 32, device=device).unbind()
        coef = torch.tensor([1.1, -0.4, 0.3, 0.6, 0.5], device=device)
        torch.testing.assert_close(noise.randn(x.shape, 7, 1, 2, 3, device=device).cpu(),
                                   noise.randn(x.shape, 7, 1, 2, 3), rtol=0, atol=1e-5)
        for clip in (False, True):
            found = []
            for where in (device, "cpu"):
                given = [v.detach().to(where).requires_grad_()
                         for v in (x, out.to(dtype).contiguous(memory_format=LAST),
                                   out.to(dtype).flip(0))]
                y, x0 = diffuse.denoise_step(
                    *given[:2], coef.to(where), 7, step=3, clip=clip, out_uncond=given[2],
                    guidance=1.5, return_x0=True)
                found.append([
                    v.detach().cpu()
                    for v in (y, x0, *torch.autograd.grad(y.sin().sum() + x0.sum(), given))])
            for ours, exact in zip(*found):
                wide = torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 1e-5
                near = torch.isclose(ours, exact, rtol=wide, atol=max(wide, 2e-5))
                # at the clamp's edge a rounding decides
                assert near.double().mean() > 0.999, "the update"
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=device)
        a = torch.rand(4, device=device)
        for ours, exact in zip(diffuse.add_noise(pixels, a, 1 - a, 7),
                               diffuse.add_noise(pixels.cpu(), a.cpu(), 1 - a.cpu(), 7)):
            torch.testing.assert_close(ours.cpu(), exact, rtol=1e-5, atol=1e-5)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="fp32,bf16",
                        help="of fp32, bf16, fp16 (default %(default)s)")
    parser.add_argument("--targets", default=",".join(TARGETS),
                        help="without a GPU (default %(default)s)")
    parser.add_argument("--unets", default=",".join(UNETS),
                        help="with a GPU, whose GroupNorms: torch.compile takes minutes for all "
                             "(default %(default)s)")
    parser.add_argument("--quick", action="store_true",
                        help="with a GPU: print training and sampling as a whole, then the "
                             "channels_last rows of GroupNorm, nothing else, and write no file")
    parser.add_argument("--batch", type=int,
                        help="with a GPU, of GroupNorm's rows (default: what each U-Net trains "
                             "with)")
    args = parser.parse_args()
    dtypes, targets = args.dtypes.split(","), args.targets.split(",")
    for name, known in [*((d, DTYPES) for d in dtypes), *((t, TARGETS) for t in targets),
                        *((u, UNETS) for u in args.unets.split(","))]:
        if name not in known:
            parser.exit(2, f"kernels.bench: error: unknown {name!r}, "
                           f"choose from {', '.join(known)}\n")
    path = Path(__file__).with_name("bench.md")
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}, {datetime.date.today()}"
    if not torch.cuda.is_available():
        lines = static_table(dtypes, targets)
        path.with_name("static.md").write_text("\n".join([
            f"{versions}; `python -m kernels.bench` without a GPU.", "", *lines]) + "\n")
        return
    check("cuda")
    print("right: GroupNorm within twice plain PyTorch's error against float64, the others equal "
          "to their twins")
    commit = "unknown"
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, cwd=path.parent).stdout.strip()
    clock = Clock("cuda")
    copy = copy_speed(clock)
    head = f"{torch.cuda.get_device_name()}, {versions}, commit {commit}; copy {copy:.0f} GB/s"
    print(head)
    ways = ("eager", "compile", "liger", "gnnhwc", "held", "diffusers")
    types, unets = [DTYPES[d] for d in dtypes], args.unets.split(",")
    if args.quick:
        for _ in whole_rows(clock):
            pass  # each row prints itself
        for _ in norm_rows(clock, copy, types, unets, layouts=(LAST,), batch=args.batch):
            pass
        return
    # a line at a time: who stops it keeps what was measured
    with open(path, "w", buffering=1) as file:
        print(head, "", sep="\n", file=file)
        for line in (overhead(clock), *whole_rows(clock)):
            print(f"- {line}", file=file)
        print("", "Times of others as multiples of ours: below 1, ours loses.", "",
              "| | ms | GB/s | share of copy | " + " | ".join(ways) + " |",
              "| --- | --- | --- | --- | " + "--- | " * len(ways), sep="\n", file=file)
        for r in itertools.chain(diffuse_rows(clock, copy, types),
                                 norm_rows(clock, copy, types, unets, batch=args.batch)):
            print(f"| {r['name']} | {r['ours']:.4f} | {r['gbs']:.0f} | {r['share']:.0%} | "
                  + " | ".join(f"{r[w] / r['ours']:.2f}" if w in r else "" for w in ways) + " |",
                  file=file)


if __name__ == "__main__":
    main()
