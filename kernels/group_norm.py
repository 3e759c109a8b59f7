"""GroupNorm, per-sample scale and shift, SiLU: one operation, forward and backward.

    xhat = (x - mean) / sqrt(var + eps)
                         over the D = C / groups * H * W values of each (sample, group)
    y    = silu(z),  z = A xhat + B
                         A = weight (1 + scale),  B = bias (1 + scale) + shift, (N, C)

and with dz = dy silu'(z), S1 = sum_p dz and S2 = sum_p dz xhat, both (N, C), summed over the
positions p:

    dx = (A dz - sum_c A S1 / D - xhat sum_c A S2 / D) / sqrt(var + eps)
                         sum_c: the channels of the group
    dscale = weight S2 + bias S1              dweight = sum_n (1 + scale) S2
    dshift = S1                               dbias   = sum_n (1 + scale) S1

Bytes per element of e bytes: at least 2e forward (x in, y out) and 3e backward (x and dy in, dx
out). These kernels move that while a group fits in one tile: 16,384 values, its channels and its
positions each counted as the next power of two (and in channels_last as many groups as make rows of
16 bytes); 3e and 5e above. Backward reads a tile of over 8,192 values twice, the second time from
the caches as far as they reach. Eager PyTorch (F.group_norm, mul, add, F.silu) moves 9e and 15e.
Statistics are fp32 and centred, E[(x - mean)^2]: E[x^2] - mean^2 has no right digit left at
mean / std = 1000. Backward keeps x and two numbers a group, and computes z again. Nothing is summed
by atomics: the same bits in every run.

Instructions a value on sm_90 in bf16, forward and backward with SiLU, over the shipped U-Nets: 14
to 19 and 24 to 32 in one pass at 16 x 16 and more, backward 36 to 39 where a group is taken in
steps, 19 to 23 and 39 to 48 split. Where a group is less than a warp's 1,024 values the fixed part
shows: up to 23 and 41 at 8 x 8, 53 and 79 at 4 x 4. Masked odd shapes take 21 and 41, one channel
a group 23 and 32.

x is (N, C, ...) with any number of further axes, contiguous or channels_last; both are read and
written as they lie. Copied alone into another project this file needs only torch, and Triton for
CUDA tensors.
"""
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

triton = None
if (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
        or "triton" in sys.modules):
    try:  # importing Triton takes 0.3 s: only where a kernel can run, be interpreted or be compiled
        import triton
        import triton.language as tl
    except ImportError:
        triton = None

TILE = 16384  # values of a group that one program takes whole; forward holds them in registers
CHUNK = 8192  # values a program takes of a group larger than that
STEP = 2048  # values the backward kernel takes at once of a tile larger than CHUNK
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# --------------------------------------------------------------------------------------- Definition
def group_norm_torch(x, groups, weight, bias, scale=None, shift=None, silu=True, eps=1e-5):
    """The same in plain PyTorch: the specification, the path of all devices but CUDA, and of
    double backward.

    PyTorch's GroupNorm has weights per channel. A batch seen as one sample of N * C channels in
    N * groups groups gives it weights per sample and channel: scale and shift then cost no pass
    over x, either way (on one CPU core 1.4 to 2.4 times as fast as GroupNorm, multiply, add, SiLU).
    """
    n, c = x.shape[:2]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b = weight.to(acc), bias.to(acc)
    if scale is not None:
        a, b = torch.addcmul(a, a, scale.to(acc)), torch.addcmul(b, b, scale.to(acc))
    if shift is not None:
        b = b + shift.to(acc)
    each = a.dim() > 1 or b.dim() > 1  # of a sample's own
    # The CPU's GroupNorm takes 16-bit x too, at a fifth of the speed. As one sample's N * C
    # channels x is widened and laid out in one pass.
    h = x.to(acc, memory_format=torch.contiguous_format if each else torch.preserve_format)
    if x.numel() == 0:
        a, b = (v.expand(n, c).reshape(n, c, *[1] * (x.dim() - 2)) for v in (a, b))
        h = h * a + b  # nothing to normalise, but the graph and zero gradients stay
    elif not each:
        h = torch.group_norm(h, groups, a, b, eps)
    else:
        a, b = (v.expand(n, c).reshape(-1) for v in (a, b))
        h = torch.group_norm(h.reshape(1, n * c, -1), n * groups, a, b, eps).view(x.shape)
    # SiLU in 16 bits: half of what eager backward saves and reads. In y's layout, which is that of
    # its gradient: SiLU's backward takes three times as long where the two differ.
    h = h.to(x.dtype, memory_format=_layout(x)) if x.is_cpu else h
    y = F.silu(h) if silu else h
    return y.to(x.dtype).contiguous(memory_format=_layout(x))


def group_norm(x, groups, weight, bias, scale=None, shift=None, *, silu=True, eps=1e-5):
    """y = act((xhat * weight + bias) * (1 + scale) + shift), act = SiLU, or the identity with
    silu=False.

    x: (N, C, ...) in fp32, bf16, fp16, or float64 (always by the plain twin);
    contiguous or channels_last, other layouts are copied first.
    groups: divides C.  weight, bias: (C,).
    scale, shift: (N, C) or None; the two halves of a chunk are read in place.
    Returns y with x's shape, dtype and layout, differentiable twice in all five tensors.
    ValueError for any other argument.
    Source: Wu and He 2018 (1803.08494);
    scale, shift: Dhariwal and Nichol 2021 (2105.05233), section 3.1.
    """
    _check(x, groups, weight, bias, scale, shift, eps)
    if triton is None or not x.is_cuda or x.dtype == torch.float64 or x.numel() == 0:
        return group_norm_torch(x, groups, weight, bias, scale, shift, silu, eps)
    if not x.is_contiguous():
        x = x.contiguous(memory_format=_layout(x))
    # A tracer or a tensor that is not real needs an operator that PyTorch knows, which costs more
    # for each call.
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return group_norm_op(x, weight, bias, scale, shift, groups, silu, eps)[0]
    return _eager(x, weight, bias, scale, shift, groups, silu, eps)


class GroupNorm(torch.nn.Module):
    """`group_norm` with its weight and bias:
    forward(x (N, C, ...), scale, shift (N, C) or None) -> y."""

    def __init__(self, groups, channels, silu=True, eps=1e-5):
        super().__init__()
        if groups < 1 or channels < 1 or channels % groups:
            raise ValueError(f"GroupNorm: {groups} groups do not divide {channels} channels")
        self.groups, self.silu, self.eps = groups, silu, eps
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x, scale=None, shift=None):
        return group_norm(x, self.groups, self.weight, self.bias, scale, shift,
                          silu=self.silu, eps=self.eps)

    def extra_repr(self):
        return f"{self.groups}, {self.weight.numel()}, silu={self.silu}, eps={self.eps}"


# ------------------------------------------------------------------------------------------- Triton
if triton is not None:
    @triton.jit
    def tile_of(pid, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr,
                BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, LOOPS: tl.constexpr = 1):
        """Where program pid works: its groups among all, (BG,) or one; the sample; the chunk, its
        column, and how many values of a group it holds; channels (BG * BC,) and which of them
        exist; offset of the sample (int64); offsets in the sample (BG * BC, BP) and which of them
        exist, both of the first of LOOPS tiles."""
        columns = (P + BP * LOOPS - 1) // (BP * LOOPS)
        chunks = columns * ((C // G + BC - 1) // BC)
        block, chunk = pid // chunks, pid % chunks
        row, column, group = chunk // columns, chunk % columns, block
        if BG > 1:                          # then BC = C / G: there is one row
            row, group = 0, block * BG + tl.arange(0, BG)
        sample = block // (G // BG)
        c = row * BC + tl.arange(0, BG * BC)
        p = column * BP + tl.arange(0, BP)
        has = c < C // G * BG
        mask = has[:, None] & (p < P)[None, :]
        c = block % (G // BG) * (C // G * BG) + c
        if LAST:
            at = p[None, :] * C + c[:, None]
        else:
            at = c[:, None] * P + p[None, :]
        count = tl.minimum(C // G - row * BC, BC) * tl.minimum(P - column * BP, BP)
        sample = sample.to(tl.int64)
        return group, sample, chunk, column, count, c, has, sample * (C * P), at, mask

    @triton.jit
    def sum_groups(v, BG: tl.constexpr):
        """Sums of a tile (BG * BC, BP), or of one column (BG * BC,), over each group: (BG,), or a
        number where there is one.

        A tile in two sums, channels and then positions: in one, over (BG, BC * BP), the lanes that
        a group lies in would not be neighbours, and Triton (3.6 and 3.7) adds up others then
        without a word.
        """
        if BG == 1:
            return tl.sum(v)
        elif v.numel == BG:
            # nothing to add; a sum along an axis of one spills without end
            return tl.reshape(v, (BG,))
        elif v.shape[0] == BG:
            return tl.sum(v, 1)
        elif v.numel == v.shape[0]:         # rows of a group lie side by side
            return tl.sum(tl.reshape(v, (BG, v.numel // BG)), 1)
        else:
            return tl.sum(tl.sum(tl.reshape(v, (BG, v.shape[0] // BG, v.shape[1])), 1), 1)

    @triton.jit
    def per_row(v, BG: tl.constexpr, BC: tl.constexpr):
        """(BG,) -> (BG * BC, 1), each group's value for all of its channels; a number stays one."""
        if BG == 1:
            return v
        elif BC == 1:
            return v[:, None]
        else:
            return tl.reshape(tl.broadcast_to(v[:, None], (BG, BC)), (BG * BC, 1))

    @triton.jit
    def coefficients(w_ptr, b_ptr, s_ptr, t_ptr, s_row, t_row, sample, c, has):
        """A and B (BC,) of one sample in fp32."""
        a = tl.load(w_ptr + c, has, 0.0).to(tl.float32)
        b = tl.load(b_ptr + c, has, 0.0).to(tl.float32)
        if s_ptr is not None:
            s = 1 + tl.load(s_ptr + sample * s_row + c, has, 0.0).to(tl.float32)
            a = a * s
            b = b * s
        if t_ptr is not None:
            b += tl.load(t_ptr + sample * t_row + c, has, 0.0).to(tl.float32)
        return a, b

    @triton.jit
    def sigmoid(z, kind: tl.constexpr):
        d = 1 + tl.exp2(z * -1.4426950408889634)  # exp2 is one instruction; overflow: 1 / inf = 0
        if kind == tl.float32:
            return 1 / d                    # five instructions
        else:                               # two, right to 4e-7: more than 16 bits hold
            r = tl.rsqrt(d)
            return r * r

    @triton.jit
    def tile_after(at, has, i: tl.constexpr, P: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr,
                   BP: tl.constexpr):
        """Offsets and mask of the program's tile i, from the offsets of its tile 0."""
        if LAST:
            at = at + i * BP * C
        else:
            at = at + i * BP
        return at, has[:, None] & (i * BP + tl.arange(0, BP) < P)[None, :]

    @triton.jit
    def gradient_at(x_ptr, dy_ptr, at, mask, mean, slope, b, SILU: tl.constexpr):
        """x - mean and dz of a tile in fp32; dz = 0 where no value exists. slope: A rstd."""
        d = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean
        dz = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        if SILU:
            z = d * slope + b[:, None]
            g = sigmoid(z, x_ptr.dtype.element_ty)
            dz *= g * (1 + z * (1 - g))
        return d, dz

    @triton.jit
    def forward_kernel(
            x_ptr,                          # (N, C, P), or (N, P, C) if LAST
            w_ptr, b_ptr,                   # (C,)
            s_ptr, t_ptr, s_row, t_row,     # (N, C) or None; elements from row to row
            y_ptr,                          # like x
            mean_ptr, rstd_ptr,             # (N * G,) fp32;
                                            # STAGE 1: mean and sum of squares (N * G, chunks)
            eps, STAGE: tl.constexpr,       # 0: all in one pass; 1: statistics of each chunk;
                                            # 2: y from them
            SILU: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            LAST: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
        group, sample, chunk, column, count, c, has, base, at, mask = tile_of(
            tl.program_id(0), C, G, P, LAST, BG, BC, BP)
        x = tl.load(x_ptr + base + at, mask, 0.0).to(tl.float32)
        if STAGE == 2:
            mean = tl.load(mean_ptr + group)
            rstd = tl.load(rstd_ptr + group)
        else:
            mean = sum_groups(x, BG) / count
            d = tl.where(mask, x - per_row(mean, BG, BC), 0.0)
            m2 = sum_groups(d * d, BG)
            if STAGE == 1:
                chunks = (P + BP - 1) // BP * ((C // G + BC - 1) // BC)
                tl.store(mean_ptr + group * chunks + chunk, mean)
                tl.store(rstd_ptr + group * chunks + chunk, m2)
            else:
                rstd = tl.rsqrt(m2 / count + eps)
                tl.store(mean_ptr + group, mean)
                tl.store(rstd_ptr + group, rstd)
        if STAGE != 1:
            a, b = coefficients(w_ptr, b_ptr, s_ptr, t_ptr, s_row, t_row, sample, c, has)
            y = (x - per_row(mean, BG, BC)) * (per_row(rstd, BG, BC) * a[:, None]) + b[:, None]
            if SILU:
                y *= sigmoid(y, x_ptr.dtype.element_ty)
            tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def combine_kernel(
            means_ptr, m2s_ptr,             # (N * G, CHUNKS) fp32
            mean_ptr, rstd_ptr,             # (N * G,) fp32
            eps, PER_GROUP: tl.constexpr, P: tl.constexpr, CHUNKS: tl.constexpr,
            BC: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr):
        """Chan, Golub and LeVeque 1979: M2 = sum_k M2_k + count_k (mean_k - mean)^2."""
        group = tl.program_id(0).to(tl.int64)
        columns: tl.constexpr = (P + BP - 1) // BP
        total = tl.zeros((BK,), tl.float32)
        for start in range(0, CHUNKS, BK):
            k = start + tl.arange(0, BK)
            count = (tl.minimum(PER_GROUP - k // columns * BC, BC)
                     * tl.minimum(P - k % columns * BP, BP))
            total += tl.load(means_ptr + group * CHUNKS + k, k < CHUNKS, 0.0) * count.to(tl.float32)
        mean = tl.sum(total) / (PER_GROUP * P)
        m2 = tl.zeros((BK,), tl.float32)
        for start in range(0, CHUNKS, BK):
            k = start + tl.arange(0, BK)
            count = (tl.minimum(PER_GROUP - k // columns * BC, BC)
                     * tl.minimum(P - k % columns * BP, BP))
            d = tl.load(means_ptr + group * CHUNKS + k, k < CHUNKS, mean) - mean
            m2 += (tl.load(m2s_ptr + group * CHUNKS + k, k < CHUNKS, 0.0)
                   + d * d * count.to(tl.float32))
        tl.store(mean_ptr + group, mean)
        tl.store(rstd_ptr + group, tl.rsqrt(tl.sum(m2) / (PER_GROUP * P) + eps))

    @triton.jit
    def backward_kernel(
            x_ptr, dy_ptr,                  # (N, C, P), or (N, P, C) if LAST
            w_ptr, b_ptr,                   # (C,)
            s_ptr, t_ptr, s_row, t_row,     # (N, C) or None; elements from row to row
            mean_ptr, rstd_ptr,             # (N * G,) fp32
            s1_ptr, s2_ptr,                 # (N, C) fp32; STAGE 1: (columns, N, C)
            dx_ptr,                         # like x
            N, STAGE: tl.constexpr,         # 0: all in one pass; 1: S1, S2 of each chunk;
                                            # 2: dx from them
            SILU: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            LAST: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
            LOOPS: tl.constexpr):           # tiles of a program; over 1 only in STAGE 0
        group, sample, chunk, column, count, c, has, base, at, mask = tile_of(
            tl.program_id(0), C, G, P, LAST, BG, BC, BP, LOOPS)
        x_ptr += base
        dy_ptr += base
        dx_ptr += base
        mean = per_row(tl.load(mean_ptr + group), BG, BC)
        rstd = per_row(tl.load(rstd_ptr + group), BG, BC)
        a, b = coefficients(w_ptr, b_ptr, s_ptr, t_ptr, s_row, t_row, sample, c, has)
        slope = a[:, None] * rstd
        d, dz = gradient_at(x_ptr, dy_ptr, at, mask, mean, slope, b, SILU)
        if STAGE != 2:
            s1 = dz
            s2 = dz * d
            for i in tl.static_range(1, LOOPS):
                there, exist = tile_after(at, has, i, P, C, LAST, BP)
                d, dz = gradient_at(x_ptr, dy_ptr, there, exist, mean, slope, b, SILU)
                s1 += dz
                s2 += dz * d
            s1 = tl.sum(s1, 1)
            s2 = tl.sum(s2, 1) * (tl.reshape(rstd, (BG * BC,)) if BG > 1 else rstd)
            to = (column.to(tl.int64) * N + sample) * C + c
            tl.store(s1_ptr + to, s1, has)
            tl.store(s2_ptr + to, s2, has)
        if STAGE == 2 and BG > 1:
            s1 = tl.load(s1_ptr + sample * C + c)
            s2 = tl.load(s2_ptr + sample * C + c)
        elif STAGE == 2:                    # a chunk may hold some of the group's channels only
            j = tl.arange(0, triton.next_power_of_2(C // G))
            every = (group % G) * (C // G) + j
            w, _ = coefficients(w_ptr, b_ptr, s_ptr, None, s_row, t_row, sample, every, j < C // G)
            mean1 = tl.sum(w * tl.load(s1_ptr + sample * C + every, j < C // G, 0.0)) / (C // G * P)
            mean2 = tl.sum(w * tl.load(s2_ptr + sample * C + every, j < C // G, 0.0)) / (C // G * P)
        if STAGE == 0 or STAGE == 2 and BG > 1:
            mean1 = per_row(sum_groups(a * s1, BG), BG, BC) / (C // G * P)
            mean2 = per_row(sum_groups(a * s2, BG), BG, BC) / (C // G * P)
        if STAGE != 1:
            # dx of the head, multiplied out, with xhat = d rstd: two instructions a value
            less = mean1 * rstd
            tilt = mean2 * rstd * rstd
            for i in tl.static_range(LOOPS):
                if LOOPS > 1:               # one tile is held, more are read again from the caches
                    there, exist = tile_after(at, has, i, P, C, LAST, BP)
                    d, dz = gradient_at(x_ptr, dy_ptr, there, exist, mean, slope, b, SILU)
                else:
                    there, exist = at, mask
                dx = dz * slope - less - d * tilt
                tl.store(dx_ptr + there, dx.to(dx_ptr.dtype.element_ty), exist)

    @triton.jit
    def parameters_kernel(
            s1_ptr, s2_ptr,                 # (N, C) fp32
            w_ptr, b_ptr, s_ptr, s_row,     # (C,), (C,), (N, C) or None; elements from row to row
            dw_ptr, db_ptr, ds_ptr,         # (C,), (C,), (N, C) or None
            N, C, BN: tl.constexpr, BC: tl.constexpr):
        """Each program owns BC channels and walks the samples in one order: the same sums in
        every run. BN samples a step, since a step waits for memory: 256 samples make two."""
        c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
        w = tl.load(w_ptr + c, c < C, 0.0).to(tl.float32)
        b = tl.load(b_ptr + c, c < C, 0.0).to(tl.float32)
        dw = tl.zeros((BN, BC), tl.float32)
        db = tl.zeros((BN, BC), tl.float32)
        start = 0
        while start < N:
            # range() with a run-time end fails in Triton 3.6's interpreter
            n = (start + tl.arange(0, BN)[:, None]).to(tl.int64)
            mask = (n < N) & (c < C)
            s1 = tl.load(s1_ptr + n * C + c, mask, 0.0)
            s2 = tl.load(s2_ptr + n * C + c, mask, 0.0)
            if s_ptr is not None:
                s = 1 + tl.load(s_ptr + n * s_row + c, mask, 0.0).to(tl.float32)
                tl.store(ds_ptr + n * C + c, (w * s2 + b * s1).to(ds_ptr.dtype.element_ty), mask)
                dw += s * s2
                db += s * s1
            else:
                dw += s2
                db += s1
            start += BN
        c = tl.program_id(0) * BC + tl.arange(0, BC)
        tl.store(dw_ptr + c, tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), c < C)
        tl.store(db_ptr + c, tl.sum(db, 0).to(db_ptr.dtype.element_ty), c < C)


# ----------------------------------------------------------------------------------------- Autograd
def _eager(x, weight, bias, scale, shift, groups, silu, eps):
    """y by the kernels, in the cheapest way that keeps what autograd asks for."""
    # a private name of PyTorch: looked at with 2.11 and 2.13
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(x, weight, bias, scale, shift, groups, silu, eps)[0]
    # a private name of PyTorch: looked at with 2.11 and 2.13
    # forward AD: Function says that it cannot
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or bias.requires_grad
            or scale is not None and scale.requires_grad
            or shift is not None and shift.requires_grad)):
        return _forward(x, weight, bias, scale, shift, groups, silu, eps)[0]
    return _GroupNorm.apply(x, weight, bias, scale, shift, groups, silu, eps)


class _GroupNorm(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, silu, eps):
        y, stats = _forward(x, weight, bias, scale, shift, groups, silu, eps)
        ctx.save_for_backward(x, weight, bias, scale, shift, stats)
        ctx.options = groups, silu, eps
        return y

    @staticmethod
    def backward(ctx, dy, _=None):
        *tensors, stats = ctx.saved_tensors
        if dy is None:
            return (None,) * 8
        groups, silu, eps = ctx.options
        if not torch.is_grad_enabled():
            grads = _backward(dy, *tensors, stats, groups, silu)
            return *(None if v is None else g for v, g in zip(tensors, grads)), None, None, None

        # create_graph: this gradient will be differentiated itself, so take the twin's
        def twin(*given):
            rest = iter(given)
            x, *others = (None if v is None else next(rest) for v in tensors)
            return group_norm_torch(x, groups, *others, silu, eps)

        grads = iter(torch.func.vjp(twin, *(v for v in tensors if v is not None))[1](dy))
        return *(None if v is None else next(grads) for v in tensors), None, None, None


class _Transformed(_GroupNorm):
    """The same for torch.func, which wants the context filled apart: PyTorch then inspects
    signatures at each call."""

    @staticmethod
    def forward(x, weight, bias, scale, shift, groups, silu, eps):
        return _forward(x, weight, bias, scale, shift, groups, silu, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5], output[1])
        ctx.options = inputs[5:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)


if triton is not None:
    Tensor = torch.Tensor

    @torch.library.custom_op("diffusion_kernels::group_norm", mutates_args=())
    def group_norm_op(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
                      shift: Tensor | None, groups: int, silu: bool,
                      eps: float) -> tuple[Tensor, Tensor]:
        """The kernels as an operator: for torch.compile, export and tensors without data."""
        return _forward(x, weight, bias, scale, shift, groups, silu, eps)

    @group_norm_op.register_fake
    def _(x, weight, bias, scale, shift, groups, silu, eps):
        return torch.empty_like(x), x.new_empty((2, x.shape[0] * groups), dtype=torch.float32)

    @torch.library.custom_op("diffusion_kernels::group_norm_backward", mutates_args=())
    def group_norm_backward_op(
            dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
            shift: Tensor | None, stats: Tensor, groups: int,
            silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _backward(dy, x, weight, bias, scale, shift, stats, groups, silu)

    @group_norm_backward_op.register_fake
    def _(dy, x, weight, bias, scale, shift, stats, groups, silu):
        like = (x, weight, bias, scale, shift)
        return tuple(weight.new_empty(0) if v is None
                     else torch.empty_like(v, memory_format=torch.contiguous_format) if v is not x
                     else torch.empty_like(x) for v in like)

    def _op_backward(ctx, dy, _):
        *tensors, stats = ctx.saved_tensors
        if dy is None:
            return (None,) * 8
        grads = group_norm_backward_op(dy, *tensors, stats, *ctx.options[:2])
        return *(None if v is None else g for v, g in zip(tensors, grads)), None, None, None

    group_norm_op.register_autograd(_op_backward, setup_context=_Transformed.setup_context)


# -------------------------------------------------------------------------------- Launch and checks
def _tiles(x, groups, warps):
    """Tiles of BG whole groups, or of BC channels of one, by BP positions: kernel arguments,
    programs, chunks.

    Groups of at most TILE values, counted as powers of two, are held whole: in channels_last
    several, for rows of 16 bytes (one access) at least, and of 32 (what memory moves at once) or 64
    if they fit and leave 128 programs. A larger group is cut, with the long side along memory.
    A warp takes 1,024 values, more where that would need over `warps` warps.
    """
    n, c = x.shape[:2]
    per_group, positions, last = (c // groups, x.numel() // (n * c),
                                  _layout(x) != torch.contiguous_format)
    bc, bp, bg = triton.next_power_of_2(per_group), triton.next_power_of_2(positions), 1
    whole, side_by_side, e = bc * bp <= TILE, last and bc == per_group, x.element_size()
    # Memory moves 32 bytes at once to a multiprocessor (L2 spares DRAM the repeats, not the way
    # up): rows of 8 bytes make 2e and 3e of traffic 8e and 12e, against 3e and 5e in full rows
    # split. Rows of 16 make them 4e and 6e: about even, for fewer launches. So split where not even
    # rows of 16 bytes fit.
    fewest = max(1, 16 // (bc * e))
    if side_by_side and groups % fewest == 0 and fewest * bc * bp > TILE:
        whole = False
    while (side_by_side and groups % (2 * bg) == 0
           and (n * groups >= 256 * bg or bg < fewest or not whole)):
        row, tile = bg * bc * e, bg * bc * (bp if whole else 1)
        if not (row < 64 and tile <= CHUNK // 2 or row < 32 and tile <= TILE // 2):
            break
        bg *= 2
    if not whole and last:
        bc = min(bc, 64)
        bp = min(bp, CHUNK // (bg * bc))
    elif not whole:
        bp = min(bp, CHUNK)
        bc = min(bc, CHUNK // bp)
    rows, columns = triton.cdiv(per_group, bc), triton.cdiv(positions, bp)
    warps = max(1, min(warps, bg * bc * bp // 1024))
    return (dict(C=c, G=groups, P=positions, LAST=last, BG=bg, BC=bc, BP=bp, num_warps=warps),
            n * groups // bg * rows * columns, rows * columns, columns)


def _in_steps(tiles, e):
    """Those of _tiles for the backward kernel, a tile over CHUNK values taken in steps of STEP.

    Held whole, x and dy of 16,384 values fill the registers of a multiprocessor: one program at a
    time, which waits for memory, computes and writes in turns. In steps two to five share it; what
    is read again is asked of the caches. Not where a contiguous x would be read in rows of less
    than 64 bytes.
    """
    channels = tiles["BG"] * tiles["BC"]
    bp = STEP // channels
    if channels * tiles["BP"] <= CHUNK or bp < 1 or bp * e < 64 and not tiles["LAST"]:
        return dict(tiles, LOOPS=1)
    return dict(tiles, BP=bp, LOOPS=triton.cdiv(tiles["P"], bp),
                num_warps=max(1, channels * bp // 256))


def _rows(scale, shift):
    """scale and shift with contiguous rows, and the elements from row to row; halves of a chunk
    stay put."""
    scale, shift = (v if v is None or v.stride(1) == 1 else v.contiguous() for v in (scale, shift))
    return scale, shift, *(0 if v is None else v.stride(0) for v in (scale, shift))


def _forward(x, weight, bias, scale, shift, groups, silu, eps):
    tiles, programs, chunks, _ = _tiles(x, groups, 8)
    y, every = torch.empty_like(x), x.shape[0] * groups
    stats = torch.empty((2, every), dtype=torch.float32, device=x.device)
    mean, rstd = stats
    given = (weight.contiguous(), bias.contiguous(), *_rows(scale, shift))
    with torch.cuda.device_of(x):
        if chunks == 1:
            forward_kernel[programs,](x, *given, y, mean, rstd, eps, STAGE=0, SILU=silu, **tiles)
        else:
            means, m2s = torch.empty((2, every * chunks), dtype=torch.float32, device=x.device)
            forward_kernel[programs,](x, *given, y, means, m2s, eps, STAGE=1, SILU=silu, **tiles)
            combine_kernel[every,](means, m2s, mean, rstd, eps, tiles["C"] // groups, tiles["P"],
                                   chunks, tiles["BC"], tiles["BP"],
                                   min(1024, triton.next_power_of_2(chunks)))
            forward_kernel[programs,](x, *given, y, mean, rstd, eps, STAGE=2, SILU=silu, **tiles)
    return y, stats


def _backward(dy, x, weight, bias, scale, shift, stats, groups, silu):
    """Gradients of x, weight, bias, scale, shift; of None an empty one."""
    tiles, programs, chunks, columns = _tiles(x, groups, 16)
    n, c = x.shape[:2]
    dx = torch.empty_like(x)
    given = (weight.contiguous(), bias.contiguous(), *_rows(scale, shift))
    read = (x, dy.contiguous(memory_format=_layout(x)), *given, *stats)
    # S1, S2; one writer each
    sums = torch.empty((2, columns, n, c), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if chunks == 1:
            backward_kernel[programs,](*read, *sums, dx, n, STAGE=0, SILU=silu,
                                       **_in_steps(tiles, x.element_size()))
            s1, s2 = sums[:, 0]
        else:
            tiles["LOOPS"] = 1
            backward_kernel[programs,](*read, *sums, dx, n, STAGE=1, SILU=silu, **tiles)
            s1, s2 = sums.sum(1)
            backward_kernel[programs,](*read, s1, s2, dx, n, STAGE=2, SILU=silu, **tiles)
        weight, bias, scale, _, row, _ = given
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dscale = (weight.new_empty(0) if scale is None
                  else torch.empty((n, c), dtype=scale.dtype, device=x.device))
        parameters_kernel[triton.cdiv(c, 16),](
            s1, s2, weight, bias, scale, row, dweight, dbias,
            None if scale is None else dscale, n, c, BN=128, BC=16, num_warps=8)
    return (dx, dweight, dbias, dscale,
            weight.new_empty(0) if shift is None else s1.to(shift.dtype, copy=True))


def _check(x, groups, weight, bias, scale, shift, eps):
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError("group_norm: x must be a floating-point tensor (N, C, ...), "
                         f"not {_name(x)}")
    n, c = x.shape[:2]
    if not isinstance(groups, int) or groups < 1 or c == 0 or c % groups:
        raise ValueError(f"group_norm: groups = {groups} must be an integer that divides x's "
                         f"{c} channels")
    if not 0 < eps < math.inf:  # math.isfinite would break a graph of torch.compile
        raise ValueError(f"group_norm: eps must be positive and finite, not {eps}")
    if n and x.numel() // n >= 2 ** 31:
        raise ValueError(f"group_norm: one sample of x has {x.numel() // n} values; "
                         "the limit is 2^31 - 1")
    device = x.device
    for name, v, shape in (("weight", weight, (c,)), ("bias", bias, (c,)),
                           ("scale", scale, (n, c)), ("shift", shift, (n, c))):
        if v is None and (name == "scale" or name == "shift"):
            continue
        if (not isinstance(v, torch.Tensor) or v.shape != shape or v.dtype not in FLOATS
                or v.device != device):
            raise ValueError(f"group_norm: {name} must be a floating-point tensor {shape} on "
                             f"{device}, not {_name(v)}")


def _name(v):
    return (f"{tuple(v.shape)} {v.dtype} on {v.device}" if isinstance(v, torch.Tensor)
            else type(v).__name__)


def _layout(x):
    """The memory format that y shares with x: channels_last only where x is so and not contiguous
    as well."""
    if not x.is_contiguous():
        for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dim and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format
