"""Noising and the denoising update: each input read once, each output written once, noise made in
registers.

add_noise.     x_t = a x0 + s eps              a, s per sample; x0 float, or uint8 scaled to [-1, 1]
denoise_step.  o      = out, or out_uncond + guidance (out - out_uncond)
               x0     = p_x x + p_out o        clamped to [-1, 1] if asked
               x_prev = c_x x + c_0 x0 + c_n eps   (std eps, element by element, where std is given)

coef = (p_x, p_out, c_x, c_0, c_n), per step or per sample. DDPM, DDIM of any eta, the DDGAN
posterior, VDM's reverse step and the shortcut's re-noising all have this form. DDIM goes to
a' x0 + k eps_hat + c_n eps with eps_hat re-derived from the clamped x0 as (x - a x0) / s:
c_x = k / s, c_0 = a' - k a / s.
eps is `noise.randn`, a function of (seed, stream, step, sample, element), whatever the layout of x.

Bytes per element of s bytes (state x: 4 bytes); in eager PyTorch each operator reads and writes
memory. The kernels move the fewest, with so many instructions per element on sm_90 (28 to 30 of
them make the noise):

                                          fewest     eager     instructions
    add_noise, uint8 -> float32              9         53          39
    add_noise, float                        3 s        8 s     32, 16-bit 34
    denoise_step                           8 + s       80      39, 16-bit 42
                                                 (eager 84 + s where out must be widened)
      with clamp                             0         + 8         + 2
      with out_uncond                       + s       + 32
      with std                              + s        + 4     all, and x0: 46, 16-bit 53
    its backward                           8 + s       44
      with clamp                          12 + 2 s     56          14

Where layouts differ (a channels_last prediction beside a row-major state) the update takes 46,
16-bit 48; noising of channels_last pictures 57 and 63, with narrow accesses.
"""
import torch

from kernels.noise import FLOATS, QUADS, WARPS, check_rng, grid, randn, rng_args, traced, triton

if triton is not None:  # kernels.noise decides: where Triton can be of use
    import triton.language as tl

    from kernels.noise import normals


# --------------------------------------------------------------------------------------- Definition
def _per_row(v, x, dtype):
    """(B,) or () -> broadcastable against x (B, ...), in `dtype`."""
    return v.to(dtype).reshape(-1, *[1] * (x.dim() - 1)) if v.dim() else v.to(dtype)


def _mirror(x, flip):
    return torch.where(flip.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)


def _add_noise_plain(x0, a, s, eps, flip):
    """The specification of `add_noise`, eps given in the working precision;
    differentiable in x0, a and s."""
    dtype, work = (torch.float32 if x0.dtype == torch.uint8 else x0.dtype), eps.dtype
    x = x0.to(work) / 127.5 - 1 if x0.dtype == torch.uint8 else x0.to(work)
    if flip is not None:
        x = _mirror(x, flip)
    x_t = torch.addcmul(_per_row(a, x, work) * x, _per_row(s, x, work), eps)
    return x_t.to(dtype), eps.to(dtype)


def add_noise(x0, a, s, seed, sample=0, step=0, stream=0, *, flip=None, return_eps=True):
    """(x_t, eps): x_t = a x0 + s eps with eps = `noise.randn` of (seed, stream, step, sample,
    element).

    x0: (B, ...) float32, bfloat16, float16, float64, or uint8 (scaled: x0 / 127.5 - 1);
    any memory layout.
    a, s: (B,) float. flip: bool (B,) or None; the last axis of those rows is mirrored, in x0 only.
    seed, sample, step, stream: as in `noise.randn`.
    return_eps=False: x_t alone, and eps is never written.
    Both results: x0's shape and type (float32 for uint8), computed in float32 and rounded once.
    Differentiable in float x0, a and s; eps is a constant.
    ValueError on a wrong type, shape or device.
    """
    if not isinstance(x0, torch.Tensor) or x0.dim() < 1 or x0.dtype not in (torch.uint8, *FLOATS):
        what = (f"{tuple(x0.shape)} {x0.dtype}" if isinstance(x0, torch.Tensor)
                else type(x0).__name__)
        raise ValueError(f"x0 must be a uint8 or float tensor of shape (B, ...), not {what}")
    rows = x0.shape[0]
    _check("a", a, x0, FLOATS, [(rows,)])
    _check("s", s, x0, FLOATS, [(rows,)])
    if flip is not None:
        _check("flip", flip, x0, (torch.bool,), [(rows,)])
        if x0.dim() < 2:
            raise ValueError("flip mirrors the last axis of each row, and x0 (B,) has none")
    rng = check_rng(rows, seed, sample, step, stream, x0.device)
    if _fused(x0) and not _grad(a, s):
        if _grad(x0):
            x_t, eps = _AddNoise.apply(x0, a, s, rng, flip, return_eps)
        else:
            dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
            x_t, eps = _like(x0, dtype), _like(x0, dtype) if return_eps else None
            _add_noise_triton(x0, a, s, rng, flip, x_t, eps)
    else:
        work = torch.float64 if x0.dtype == torch.float64 else torch.float32
        x_t, eps = _add_noise_plain(
            x0, a, s, randn(x0.shape, *rng, dtype=work, device=x0.device), flip)
    return (x_t, eps) if return_eps else x_t


def _denoise_plain(x, out, coef, eps, out_uncond, guidance, clip, std):
    """The specification of `denoise_step`; eps None: no noise. Differentiable in everything."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    p_x, p_out, c_x, c_0, c_n = (_per_row(c, x, work) for c in coef.unbind(-1))
    state, o = x.to(work), out.to(work)
    if out_uncond is not None:
        o_u = out_uncond.to(work)
        if isinstance(guidance, torch.Tensor):
            guidance = _per_row(guidance, x, work)
        o = o_u + guidance * (o - o_u)
    x0 = p_x * state + p_out * o
    if clip:
        x0 = x0.clamp(-1, 1)
    x_prev = c_x * state + c_0 * x0
    if eps is not None:
        x_prev = x_prev + (c_n if std is None else std.to(work)) * eps
    return x_prev.to(x.dtype), x0.to(x.dtype)


def denoise_step(x, out, coef, seed=0, sample=0, step=0, stream=0, *, out_uncond=None, guidance=1.0,
                 clip=False, std=None, return_x0=False):
    """One step of any sampler (see the head of this file): x_prev, or (x_prev, x0) with return_x0.

    x: (B, ...) state, float32 (or 16-bit, or float64). out, out_uncond: x's shape, any float type.
    coef: float32 (5,) or (B, 5) = (p_x, p_out, c_x, c_0, c_n).
    guidance: number or float (B,); 1 is `out` itself.
    clip: clamp x0 to [-1, 1]. std: x's shape, stands in for c_n (learned variance).
    seed, sample, step, stream: as in `noise.randn`.
    All tensors: on x's device, in any memory layout.
    Results: x's shape and type, computed in float32 and rounded once. c_n = 0 adds exactly nothing.
    Differentiable in x, out and out_uncond (on CUDA by one kernel), and in coef, guidance and std
    (by plain PyTorch). ValueError on a wrong type, shape or device.
    """
    if not isinstance(x, torch.Tensor) or x.dim() < 1 or x.dtype not in FLOATS:
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor of shape (B, ...), not {what}")
    rows, shape = x.shape[0], [tuple(x.shape)]
    for name, t in (("out", out), ("out_uncond", out_uncond), ("std", std)):
        if t is not None or name == "out":
            _check(name, t, x, FLOATS, shape)
    _check("coef", coef, x,
           (torch.float64, torch.float32) if x.dtype == torch.float64 else (torch.float32,),
           [(5,), (rows, 5)])
    if isinstance(guidance, torch.Tensor):
        _check("guidance", guidance, x, FLOATS, [(rows,)])
    elif not isinstance(guidance, (int, float)):
        raise ValueError(f"guidance must be a number or a float tensor of shape ({rows},), "
                         f"not {guidance!r}")
    rng = check_rng(rows, seed, sample, step, stream, x.device)
    clip = bool(clip)
    if _fused(x) and not _grad(coef, guidance, std):
        if _grad(x, out, out_uncond):
            y, x0 = _DenoiseStep.apply(
                x, out, out_uncond, coef, rng, guidance, clip, std, return_x0)
        else:
            y, x0 = _like(x), _like(x) if return_x0 else None
            _denoise_triton(x, out, coef, rng, out_uncond, guidance, clip, std, y, x0)
    else:
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        noisy = (std is not None or coef.requires_grad or coef.device.type != "cpu" or traced(coef)
                 or bool(coef[..., 4].any()))  # what is not seen is not drawn
        eps = randn(x.shape, *rng, dtype=work, device=x.device) if noisy else None
        y, x0 = _denoise_plain(x, out, coef, eps, out_uncond, guidance, clip, std)
    return (y, x0) if return_x0 else y


def _denoise_backward_plain(g, h, x, out, out_uncond, coef, guidance, clip, guided):
    """Gradients of x, out and out_uncond from those of x_prev and x0 (or None).

    Without clip x, out and out_uncond are not read.
    """
    p_x, p_out, c_x, c_0, _ = (_per_row(c, g, torch.float32) for c in coef.unbind(-1))
    w = _per_row(guidance, g, torch.float32) if isinstance(guidance, torch.Tensor) else guidance
    g = g.float()
    d = c_0 * g if h is None else c_0 * g + h.float()
    if clip:
        o = (out.float() if out_uncond is None
             else out_uncond.float() + w * (out.float() - out_uncond.float()))
        d = d * (p_x * x.float() + p_out * o).abs().le(1)
    return c_x * g + p_x * d, p_out * d * (w if guided else 1), p_out * d * (1 - w)


# ------------------------------------------------------------------------------------------- Triton
if triton is not None:
    # e: an element's index in its sample's C, H, W order.
    # SPATIAL 0: samples lie in memory in that order. Else SPATIAL = H * W (a constant: division
    # becomes multiplication), and each tensor has its own strides of channel e // SPATIAL and place
    # e % SPATIAL: channels_last, slices of it, ...

    @triton.jit
    def _at(e, b, b_stride, c_stride, p_stride, SPATIAL: tl.constexpr):
        if SPATIAL == 0:
            return b * b_stride + e
        else:
            return b * b_stride + (e // SPATIAL) * c_stride + (e % SPATIAL) * p_stride

    @triton.jit
    def _load(ptr, e, mask, b, b_stride, c_stride, p_stride, SPATIAL: tl.constexpr):
        x = tl.load(ptr + _at(e, b, b_stride, c_stride, p_stride, SPATIAL), mask=mask, other=0)
        return x.to(tl.float32)

    @triton.jit
    def _store(ptr, x, e, mask, b, b_stride, c_stride, p_stride, SPATIAL: tl.constexpr):
        at = _at(e, b, b_stride, c_stride, p_stride, SPATIAL)
        tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["seed_lo", "seed_hi", "sample", "step", "stream_id"])
    def _add_noise_kernel(
        x_ptr, x_b, x_c, x_p,  # (B, C, spatial) uint8 or float, and its strides
        a_ptr, s_ptr,  # (B,) float32
        flip_ptr,  # (B,) uint8, or None
        y_ptr, eps_ptr,  # (B, C, spatial) out: x_t, and eps or None, float, of equal strides
        y_b, y_c, y_p,
        size,  # elements of a sample: C * spatial
        seed_ptr, seed_lo, seed_hi,  # see noise.normals
        sample_ptr, sample, step_ptr, step, stream_id,
        QUADS: tl.constexpr, WIDTH: tl.constexpr, SPATIAL: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        e = tile * (4 * QUADS) + tl.arange(0, 4 * QUADS)
        mask = e < size
        source = e
        if flip_ptr is not None:  # the width is a constant: divided by multiplication
            source = e + tl.load(flip_ptr + b).to(tl.int32) * (WIDTH - 1 - 2 * (e % WIDTH))
        x = _load(x_ptr, source, mask, b, x_b, x_c, x_p, SPATIAL)
        if x_ptr.dtype.element_ty == tl.uint8:
            # x / 127.5 - 1 in one fused step would pass 1 at 255
            x = (x - 127.5) * 0.00784313725490196
        n = normals(tile, b, seed_ptr, seed_lo, seed_hi, sample_ptr, sample, step_ptr, step,
                    stream_id, QUADS, y_ptr.dtype.element_ty.primitive_bitwidth == 16)
        y = tl.load(a_ptr + b) * x + tl.load(s_ptr + b) * n
        _store(y_ptr, y, e, mask, b, y_b, y_c, y_p, SPATIAL)
        if eps_ptr is not None:
            _store(eps_ptr, n, e, mask, b, y_b, y_c, y_p, SPATIAL)

    @triton.jit(do_not_specialize=["seed_lo", "seed_hi", "sample", "step", "stream_id"])
    def _denoise_kernel(
        x_ptr, x_b, x_c, x_p,  # (B, C, spatial) float state, and its strides
        out_ptr, out_b, out_c, out_p,  # the same of the network's output
        unc_ptr, unc_b, unc_c, unc_p,  # the same of the unconditional one, or None
        std_ptr, std_b, std_c, std_p,  # the same of the noise's scale, or None: c_n
        coef_ptr, coef_b,  # (5,) with row stride 0, or (B, 5) float32
        guide_ptr, guide,  # (B,) float32, or None: a number
        y_ptr, x0_ptr,  # (B, C, spatial) out: x_prev, and x0 or None; of equal strides
        y_b, y_c, y_p,
        size,
        seed_ptr, seed_lo, seed_hi,
        sample_ptr, sample, step_ptr, step, stream_id,
        QUADS: tl.constexpr, CLIP: tl.constexpr, SPATIAL: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        tile = tl.program_id(1)
        e = tile * (4 * QUADS) + tl.arange(0, 4 * QUADS)
        mask = e < size
        row = coef_ptr + b * coef_b
        x = _load(x_ptr, e, mask, b, x_b, x_c, x_p, SPATIAL)
        o = _load(out_ptr, e, mask, b, out_b, out_c, out_p, SPATIAL)
        if unc_ptr is not None:
            u = _load(unc_ptr, e, mask, b, unc_b, unc_c, unc_p, SPATIAL)
            if guide_ptr is not None:
                guide = tl.load(guide_ptr + b)
            o = u + guide * (o - u)
        x0 = tl.load(row) * x + tl.load(row + 1) * o
        if CLIP:  # a NaN stays one
            x0 = tl.maximum(x0, -1.0, propagate_nan=tl.PropagateNan.ALL)
            x0 = tl.minimum(x0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        if std_ptr is not None:
            scale = _load(std_ptr, e, mask, b, std_b, std_c, std_p, SPATIAL)
        else:
            scale = tl.load(row + 4)
        n = normals(tile, b, seed_ptr, seed_lo, seed_hi, sample_ptr, sample, step_ptr, step,
                    stream_id, QUADS, y_ptr.dtype.element_ty.primitive_bitwidth == 16)
        y = tl.load(row + 2) * x + tl.load(row + 3) * x0 + scale * n
        _store(y_ptr, y, e, mask, b, y_b, y_c, y_p, SPATIAL)
        if x0_ptr is not None:
            _store(x0_ptr, x0, e, mask, b, y_b, y_c, y_p, SPATIAL)

    @triton.jit
    def _denoise_backward_kernel(
        g_ptr, g_b, g_c, g_p,  # (B, C, spatial) gradient of x_prev
        h_ptr, h_b, h_c, h_p,  # the same of x0, or None
        x_ptr, x_b, x_c, x_p,  # x, out, out_uncond: read only where CLIP
        out_ptr, out_b, out_c, out_p,
        unc_ptr, unc_b, unc_c, unc_p,
        coef_ptr, coef_b,
        guide_ptr, guide,
        dx_ptr, dx_b, dx_c, dx_p,  # out: gradients of x, out, out_uncond, or None
        do_ptr, do_b, do_c, do_p,
        du_ptr, du_b, du_c, du_p,
        size,
        TILE: tl.constexpr, CLIP: tl.constexpr, GUIDED: tl.constexpr, SPATIAL: tl.constexpr,
    ):
        b = tl.program_id(0).to(tl.int64)
        e = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = e < size
        row = coef_ptr + b * coef_b
        p_x = tl.load(row)
        p_out = tl.load(row + 1)
        if guide_ptr is not None:
            guide = tl.load(guide_ptr + b)
        g = _load(g_ptr, e, mask, b, g_b, g_c, g_p, SPATIAL)
        d = tl.load(row + 3) * g  # gradient of x0
        if h_ptr is not None:
            d += _load(h_ptr, e, mask, b, h_b, h_c, h_p, SPATIAL)
        if CLIP:
            x = _load(x_ptr, e, mask, b, x_b, x_c, x_p, SPATIAL)
            o = _load(out_ptr, e, mask, b, out_b, out_c, out_p, SPATIAL)
            if GUIDED:
                u = _load(unc_ptr, e, mask, b, unc_b, unc_c, unc_p, SPATIAL)
                o = u + guide * (o - u)
            x0 = p_x * x + p_out * o
            # clamp passes the gradient at its edges, too
            d = tl.where((x0 >= -1.0) & (x0 <= 1.0), d, 0.0)
        if dx_ptr is not None:
            dx = tl.load(row + 2) * g + p_x * d
            _store(dx_ptr, dx, e, mask, b, dx_b, dx_c, dx_p, SPATIAL)
        d = p_out * d
        if do_ptr is not None:
            do = d
            if GUIDED:
                do = guide * d
            _store(do_ptr, do, e, mask, b, do_b, do_c, do_p, SPATIAL)
        if du_ptr is not None:
            _store(du_ptr, (1.0 - guide) * d, e, mask, b, du_b, du_c, du_p, SPATIAL)


# ----------------------------------------------------------------------------------------- Autograd
class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, a, s, rng, flip, want_eps):
        x_t, eps = _like(x0), _like(x0) if want_eps else None
        _add_noise_triton(x0, a, s, rng, flip, x_t, eps)
        ctx.save_for_backward(a, flip)
        if want_eps:
            ctx.mark_non_differentiable(eps)
        return x_t, eps

    @staticmethod
    def backward(ctx, g, _):
        a, flip = ctx.saved_tensors
        dx = (g * _per_row(a, g, torch.float32)).to(g.dtype)
        if flip is not None:
            dx = _mirror(dx, flip)
        return dx, None, None, None, None, None


class _DenoiseStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out, out_uncond, coef, rng, guidance, clip, std, want_x0):
        y, x0 = _like(x), _like(x) if want_x0 else None
        _denoise_triton(x, out, coef, rng, out_uncond, guidance, clip, std, y, x0)
        ctx.set_materialize_grads(False)
        # The update is linear except for the clamp, which alone needs the inputs again.
        per_row = isinstance(guidance, torch.Tensor)
        ctx.save_for_backward(coef, guidance if per_row else None,
                              *((x, out, out_uncond) if clip else (None, None, None)))
        ctx.guidance, ctx.clip = None if per_row else guidance, clip
        ctx.dtypes = [None if t is None else t.dtype for t in (x, out, out_uncond)]
        return y, x0

    @staticmethod
    def backward(ctx, g, h):
        coef, guidance, x, out, out_uncond = ctx.saved_tensors
        if g is None:
            if h is None:
                return (None,) * 9
            g = torch.zeros_like(h)
        guidance = ctx.guidance if guidance is None else guidance
        needs, guided = ctx.needs_input_grad[:3], ctx.dtypes[2] is not None
        if torch.is_grad_enabled():
            # create_graph: these gradients may be differentiated themselves, so by operators that
            # can be
            grads = _denoise_backward_plain(
                g, h, x, out, out_uncond, coef, guidance, ctx.clip, guided)
            grads = [d.to(dtype) if need else None
                     for d, dtype, need in zip(grads, ctx.dtypes, needs)]
        else:
            grads = [_like(g, dtype) if need else None for dtype, need in zip(ctx.dtypes, needs)]
            _denoise_backward_triton(
                g, h, x, out, out_uncond, coef, guidance, ctx.clip, guided, *grads)
        return *grads, None, None, None, None, None, None


# -------------------------------------------------------------------------------- Launch and checks
def _strides(x):
    """(sample, channel, place) strides of x (B, C, *spatial), (B, C), (B,);
    None where three cannot do."""
    place, size = 0, 1
    for n, stride in reversed(tuple(zip(x.shape[2:], x.stride()[2:]))):
        if n > 1:
            if size == 1:
                place = stride
            elif stride != place * size:
                return None
            size *= n
    span = sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:]))
    return (x.stride(0), x.stride(1) if x.dim() > 1 else 0, place) if span < 2 ** 31 else None


def _view(t):
    """A kernel's four arguments for one tensor (or None): the pointer and its strides."""
    if t is None:
        return None, 0, 0, 0
    strides = _strides(t)
    if strides is None:  # a transposed picture, say: right, at the price of a copy
        t = t.contiguous()
        strides = _strides(t)
    return t, *strides


def _sizes(*views):
    """Elements of a sample, and SPATIAL: 0 where the samples of all views lie in C, H, W order."""
    shape = views[0][0].shape
    channels, spatial = (shape[1] if len(shape) > 1 else 1), shape[2:].numel()
    linear = all(t is None or (channels == 1 or c == spatial) and (spatial == 1 or p == 1)
                 for t, _, c, p in views)
    return channels * spatial, 0 if linear else spatial


def _like(x, dtype=None):
    """An output in x's memory format, or, where the kernels cannot write that, row-major."""
    y = torch.empty_like(x, dtype=dtype)
    return y if _strides(y) else torch.empty(x.shape, dtype=y.dtype, device=y.device)


def _coef_args(coef, guidance):
    per_row = isinstance(guidance, torch.Tensor)
    guide = (guidance.float().contiguous(), 0.0) if per_row else (None, float(guidance))
    return coef.contiguous(), 5 if coef.dim() == 2 else 0, *guide


def _add_noise_triton(x0, a, s, rng, flip, x_t, eps):
    """Fill x_t and eps (or None), which have equal strides.

    rng: what `noise.check_rng` returned.
    """
    x, y = _view(x0), _view(x_t)
    size, spatial = _sizes(x, y)
    flip, width = (None, 1) if flip is None else (flip.contiguous().view(torch.uint8), x0.shape[-1])
    with torch.cuda.device_of(x0):
        _add_noise_kernel[grid(x0.shape[0], size)](
            *x, a.float().contiguous(), s.float().contiguous(), flip, x_t, eps, *y[1:], size,
            **rng_args(*rng), WIDTH=width, SPATIAL=spatial,
            num_warps=2 * WARPS if spatial else WARPS)  # places cost registers


def _denoise_triton(x, out, coef, rng, out_uncond, guidance, clip, std, y, x0):
    """Fill y, and x0 (or None), which have equal strides."""
    *reads, write = (_view(t) for t in (x, out, out_uncond, std, y))
    size, spatial = _sizes(*reads, write)
    with torch.cuda.device_of(x):
        _denoise_kernel[grid(x.shape[0], size)](
            *sum(reads, ()), *_coef_args(coef, guidance), y, x0, *write[1:], size,
            **rng_args(*rng), CLIP=clip, SPATIAL=spatial,
            num_warps=2 * WARPS)  # more inputs: fewer elements a thread


def _denoise_backward_triton(g, h, x, out, out_uncond, coef, guidance, clip, guided, dx, do, du):
    """Fill those of dx, do, du that are not None.

    h, and without clip x, out and out_uncond, may be None.
    """
    views = [_view(t) for t in (g, h, x, out, out_uncond, dx, do, du)]
    size, spatial = _sizes(*views)
    with torch.cuda.device_of(g):
        _denoise_backward_kernel[grid(g.shape[0], size)](
            *sum(views[:5], ()), *_coef_args(coef, guidance), *sum(views[5:], ()), size,
            TILE=4 * QUADS, CLIP=clip, GUIDED=guided, SPATIAL=spatial, num_warps=2 * WARPS)


def _check(name, t, x, dtypes, shapes):
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(t).__name__}")
    if t.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, "
                         f"not {str(t.dtype)[6:]}")
    if tuple(t.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, "
                         f"not {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} but the data is on {x.device}: move it")


def _fused(x):
    return (x.is_cuda and triton is not None and x.dtype != torch.float64 and x.numel() > 0
            and not traced(x))


def _grad(*tensors):
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad
                                           for t in tensors)
