"""Counter-based normals: each number is a function of (seed, stream, step, sample, element),
not of a state.

Operation.  Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
as easy as 1, 2, 3", 2011):

    key     = (seed mod 2^32, seed div 2^32)
    counter = (e div 4, sample, step, stream)
              e: index of the element in its sample's C, H, W order

gives four 32-bit words, those of elements 4 (e div 4) + 0..3. Batch, memory layout and device play
no part.

Equation.  Box-Muller, words (w0, w1) -> normals (n0, n1) and (w2, w3) -> (n2, n3).
fl() rounds to float32:

    u  = fl(fl(w0) 2^-32 + 2^-33)                  in [2^-33, 1]: log u is finite, |n| <= 6.77
    v  = fl(w1 read as a signed int32) 2^-32       in [-1/2, 1/2], in turns
    n0 = sqrt(-2 log u) cos(2 pi v)                n1 = sqrt(-2 log u) sin(2 pi v)

u and v are the same bits everywhere. Both angles are folded into [-1/4, 1/4] turns by exact
subtractions, cos(2 pi v) = sin(2 pi (1/4 - |v|)) and |sin(2 pi v)| = sin(2 pi min(|v|, 1/2 - |v|)),
so that the smallest normals, too, are right in proportion: the twin to 3e-7, the kernel, whose
polynomials are short, to 5e-6. So both agree to one unit in the last place of bfloat16 and float16,
and to 1e-5 in float32.

Bytes per element of s bytes.  Fewest: s (one write). Eager: `torch.randn` also moves s, but its
numbers depend on batch, layout and device; this function in eager PyTorch (the twin below) moves
about 500. The kernel takes 28.2 instructions per normal on sm_90 (28.5 with seed and step in device
memory, 28.8 in 16-bit types), and no local memory.
"""
import math
import operator
import os
import sys

import torch

triton = None
if (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
        or "triton" in sys.modules):
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = None

M32 = 0xFFFFFFFF
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Counters per pass of the plain twin: its buffers (64 KB each) stay in cache, and PyTorch on one
# thread (several threads on a busy machine make small int64 operators far slower).
_CHUNK = 8192
QUADS = 256  # counters per program of the Triton kernels: 1,024 elements
WARPS = 1  # 32 elements a thread: what a thread does once (key, addresses) costs each little


# --------------------------------------------------------------------------------------- Definition
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 in int64 arithmetic: the specification of the words.

    c0..c3: the counter, ints or int64 tensors that broadcast against each other.
    k0, k1: the key, ints or tensors.
    All are taken mod 2^32. Returns four int64 tensors with words in [0, 2^32).
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) & M32 for c in (c0, c1, c2, c3))
    for _ in range(10):
        # An int64 product wraps to the right 64 bits; its low half is masked with the next
        # exclusive or. Unequal shapes broadcast as late as they can: the first rounds touch
        # (quads,) and (rows, 1) only.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0 & M32).bitwise_and_(M32)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1 & M32).bitwise_and_(M32)
        c1, c3 = p1, p0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1 & M32, c2, c3 & M32


def _box_muller(w0, w1):
    """Words (int64) -> radius, cosine, sine (float32), as the header defines them."""
    u = w0.to(torch.float32).mul_(2.0 ** -32).add_(2.0 ** -33)
    v = w1.to(torch.int32).to(torch.float32).mul_(2.0 ** -32)  # to int32: the same bits, signed
    r = u.log_().mul_(-2.0).sqrt_()
    a = v.abs()
    cos = (0.25 - a).mul_(2 * math.pi).sin_()
    sin = torch.minimum(a, 0.5 - a).mul_(2 * math.pi).sin_().copysign_(v)
    return r, cos, sin


def _randn_plain(rows, size, seed, sample, step, stream, device):
    """(rows, size) float32 normals; arguments as `check_rng` returns them."""
    quads = -(-size // 4)
    c0 = torch.arange(quads, device=device)
    if not isinstance(sample, torch.Tensor):
        sample = torch.arange(sample, sample + rows, device=device)
    c1 = sample.view(rows, 1)
    out = torch.empty(rows, quads, 2, 2, device=device)  # (row, counter, pair, cos or sin)
    chunk = _CHUNK if device.type == "cpu" and not torch.compiler.is_compiling() else rows * quads
    many = max(1, chunk // max(quads, 1))
    for b in range(0, rows, many):
        for q in range(0, quads, chunk):
            w0, w1, w2, w3 = philox(c0[q:q + chunk], c1[b:b + many], step, stream,
                                    seed & M32, seed >> 32)
            # (pair, row, counter)
            r, cos, sin = _box_muller(torch.stack((w0, w2)), torch.stack((w1, w3)))
            part = out[b:b + many, q:q + chunk].permute(3, 2, 0, 1)
            part[0], part[1] = cos.mul_(r), sin.mul_(r)
    return out.view(rows, 4 * quads)[:, :size]


def randn(shape, seed, sample=0, step=0, stream=0, *, dtype=torch.float32, device="cpu"):
    """Standard normals of `shape` (B, ...): row b depends on (seed, stream, step, its sample
    index) only.

    seed: int in [-2^63, 2^64) or 0-d int64 tensor.
    step: int in [0, 2^32) or 0-d int64 tensor. stream: int.
    sample: int, the index of row 0 (rows are consecutive),
    or int64 tensor (B,) on `device`, one a row.
    dtype: float32, bfloat16, float16, or float64 (the float32 normals, widened).
    Result: row-major, on `device`. Tensors are read when the kernel runs: a replayed CUDA graph
    draws what they hold then. ValueError on a wrong type, shape, range or device.
    """
    shape = torch.Size(shape)
    if len(shape) < 1:
        raise ValueError("shape must be (B, ...), not ()")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype}")
    device = torch.device(device)
    if device.type != "cpu" and device.index is None:
        device = torch.empty(0, device=device).device
    rng = check_rng(shape[0], seed, sample, step, stream, device)
    y = torch.empty(shape, dtype=dtype, device=device)
    if shape.numel() == 0:
        return y
    if device.type == "cuda" and triton is not None and dtype != torch.float64 and not traced(y):
        _randn_triton(y, *rng)
        return y
    # Other accelerators lack parts of int64 arithmetic:
    # the same numbers, made on the CPU and copied.
    work = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    if work != device:
        rng = [r.to(work) if isinstance(r, torch.Tensor) else r for r in rng]
    y = _randn_plain(shape[0], shape.numel() // shape[0], *rng, work)
    # drops the padding to a multiple of four
    return y.to(device, dtype).reshape(shape).contiguous()


# ------------------------------------------------------------------------------------------- Triton
if triton is not None:
    @triton.jit
    def philox_words(c0, c1, c2, c3, k0, k1):
        """uint32 blocks or scalars -> four uint32 words; a scalar stays one for as many rounds
        as it can."""
        for _ in tl.static_range(10):
            p0 = c0.to(tl.uint64) * 0xD2511F53  # one wide multiply gives both halves
            p1 = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c1 = p1.to(tl.uint32)
            c3 = p0.to(tl.uint32)
            k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
            k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
        return c0, c1, c2, c3

    @triton.jit
    def sin_turns(x):
        """sin(2 pi x) for |x| <= 1/4: odd minimax polynomial, relative error 9.4e-7 before
        rounding."""
        z = x * x
        p = z * -71.47469329833984 + 81.39535522460938
        p = p * z - 41.33894348144531
        p = p * z + 6.28317928314209
        return p * x

    @triton.jit
    def box_muller(w0, w1):
        """Two blocks of uint32 words -> two blocks of float32 normals, without table, branch or
        slow path."""
        u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        # u = 2^e (1 + f), f in [-1/3, 1/3): -2 log u = -2 log(2) e - 2 log(1 + f).
        # For u >= 2/3, e = 0 and f is exact: small radii keep their relative accuracy.
        # Minimax polynomial, relative error 7.2e-6.
        i = u.to(tl.int32, bitcast=True)
        e = (i - 0x3F2AAAAB) & -0x800000  # e 2^23
        f = (i - e).to(tl.float32, bitcast=True) - 1.0
        p = f * 0.3869965672492981 - 0.4529309570789337
        p = p * f + 0.4969938397407532
        p = p * f - 0.6643840074539185
        p = p * f + 1.0000404119491577
        p = p * f - 2.000014305114746
        r = tl.sqrt(p * f + e.to(tl.float32) * -1.6525917308740878e-07)  # -2 log(2) 2^-23
        v = w1.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
        a = tl.abs(v)
        s = r * sin_turns(tl.minimum(a, 0.5 - a))
        # v's sign is w1's
        s = (s.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
        return r * sin_turns(0.25 - a), s

    @triton.jit
    def four(c0, c1, c2, c3, k0, k1):
        """The four normals of each counter."""
        w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, k0, k1)
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
        return n0, n1, n2, n3

    @triton.jit
    def normals(tile, b, seed_ptr, seed_lo, seed_hi, sample_ptr, sample, step_ptr, step, stream_id,
                QUADS: tl.constexpr, PAIRS: tl.constexpr):
        """(4 QUADS,) float32 normals of row b from element 4 QUADS tile on.

        A thread holds those of one counter, four elements, together, and with PAIRS those of two:
        128 bits of a 32-bit or a 16-bit type, that are stored without a detour through shared
        memory.

        seed, sample and step come from device memory where their pointer is not None, so that a
        CUDA graph can be replayed with new ones; else from the number (the seed's in two halves).
        """
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)  # () int64
            k0 = seed.to(tl.uint32)
            k1 = (seed >> 32).to(tl.uint32)
        else:
            k0 = seed_lo.to(tl.uint32)
            k1 = seed_hi.to(tl.uint32)
        if sample_ptr is not None:
            c1 = tl.load(sample_ptr + b).to(tl.uint32)  # (B,) int64
        else:
            c1 = (sample.to(tl.int64) + b).to(tl.uint32)
        if step_ptr is not None:
            c2 = tl.load(step_ptr).to(tl.uint32)  # () int64
        else:
            c2 = step.to(tl.uint32)
        c3 = stream_id.to(tl.uint32)
        # The outer join is the index's low bit: n0, n1, n2, n3 in this order.
        if PAIRS:
            q = tile * QUADS + 2 * tl.arange(0, QUADS // 2)
            n0, n1, n2, n3 = four(q.to(tl.uint32), c1, c2, c3, k0, k1)
            m0, m1, m2, m3 = four((q + 1).to(tl.uint32), c1, c2, c3, k0, k1)
            return tl.reshape(tl.join(tl.join(tl.join(n0, m0), tl.join(n2, m2)),
                                      tl.join(tl.join(n1, m1), tl.join(n3, m3))), (4 * QUADS,))
        n0, n1, n2, n3 = four((tile * QUADS + tl.arange(0, QUADS)).to(tl.uint32),
                              c1, c2, c3, k0, k1)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * QUADS,))

    @triton.jit(do_not_specialize=["seed_lo", "seed_hi", "sample", "step", "stream_id"])
    def _randn_kernel(
        y_ptr,  # (B, size) out, float, rows dense
        size,
        seed_ptr, seed_lo, seed_hi,  # () int64 or None; else two halves
        sample_ptr, sample,  # (B,) int64 or None; else the first row's index
        step_ptr, step,  # () int64 or None; else a number
        stream_id,
        QUADS: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        e = tile * (4 * QUADS) + tl.arange(0, 4 * QUADS)
        n = normals(tile, b, seed_ptr, seed_lo, seed_hi, sample_ptr, sample, step_ptr, step,
                    stream_id, QUADS, y_ptr.dtype.element_ty.primitive_bitwidth == 16)
        tl.store(y_ptr + b * size + e, n.to(y_ptr.dtype.element_ty), mask=e < size)


# -------------------------------------------------------------------------------- Launch and checks
def grid(rows, size):
    """Launch grid (rows, tiles) for samples of `size` elements;
    ValueError beyond 32-bit offsets."""
    if size > 65535 * 4 * QUADS:  # the second dimension of a grid
        raise ValueError(f"a sample has {size} elements; the kernels take at most "
                         f"{65535 * 4 * QUADS}: split it")
    if rows > 2 ** 31 - 1:
        raise ValueError(f"a batch has {rows} rows; the kernels take fewer than 2^31: split it")
    return rows, -(-size // (4 * QUADS))


def rng_args(seed, sample, step, stream):
    """The kernels' arguments from what `check_rng` returned; words as signed ints: one type,
    one compile."""
    def signed(word):
        word &= M32
        return word - 2 ** 32 if word >= 2 ** 31 else word

    def split(value):
        return (value, 0) if isinstance(value, torch.Tensor) else (None, value)

    seed_ptr, seed = split(seed)
    sample_ptr, sample = split(sample)
    step_ptr, step = split(step)
    return dict(seed_ptr=seed_ptr, seed_lo=signed(seed), seed_hi=signed(seed >> 32),
                sample_ptr=sample_ptr, sample=signed(sample), step_ptr=step_ptr, step=signed(step),
                stream_id=signed(stream), QUADS=QUADS)


def _randn_triton(y, seed, sample, step, stream):
    """Fill y (B, ...), dense in row-major order, on its own device."""
    rows, size = y.shape[0], y[0].numel()
    with torch.cuda.device_of(y):
        _randn_kernel[grid(rows, size)](y, size, **rng_args(seed, sample, step, stream),
                                        num_warps=WARPS)


def check_rng(rows, seed, sample, step, stream, device):
    """(seed, sample, step, stream), each an int or an int64 tensor on `device`; else ValueError."""
    def word(name, value, low, high, shape=()):
        kind = "an int" if name == "stream" else f"an int or an int64 tensor of shape {shape}"
        if isinstance(value, torch.Tensor) and name != "stream":
            if tuple(value.shape) != shape or value.dtype != torch.int64:
                raise ValueError(f"{name} must be {kind}, not {tuple(value.shape)} {value.dtype}")
            if value.device == device:
                return value.contiguous()
            if shape or value.device.type != "cpu":
                raise ValueError(f"{name} is on {value.device} but the noise is on {device}: "
                                 "move it")
        try:
            value = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be {kind}, not {value!r}") from None
        if not low <= value < high:
            raise ValueError(f"{name} must be in [{low}, {high}), not {value}")
        return value

    return (word("seed", seed, -2 ** 63, 2 ** 64),
            word("sample", sample, 0, 2 ** 32 - max(rows - 1, 0), (rows,)),
            word("step", step, 0, 2 ** 32),
            word("stream", stream, 0, 2 ** 32))


def traced(*tensors):
    """Whether this is no plain run on plain tensors: there a launch cannot be, and the twin,
    which can be traced, is taken."""
    # private names of PyTorch: looked at with 2.11 and 2.13
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ) or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors)
