"""Checks of the Triton kernels of noise.py and diffuse.py without a GPU; the tests start this as a
program.

    TRITON_INTERPRET=1 python tests/interp_noise_diffuse.py noise|diffuse
        interpreted, against float64

It needs a process of its own: Triton reads TRITON_INTERPRET once. `normals` is the float64
reference of the other tests, too.
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
NAN = float("nan")


# ------------------------------------------------------------------ reference, in NumPy and float64

def words(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 in uint64, from the paper; arguments broadcast."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3, k0, k1 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3, k0, k1))
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = ((p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low,
                          (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low)
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def normals(shape, seed, sample, step, stream):
    """(B, ...) float64: Box-Muller in float64 on the float32 u and v that noise.py's head
    defines."""
    rows, size = shape[0], int(np.prod(shape[1:]))
    seed %= 2 ** 64
    sample = (np.arange(sample, sample + rows) if isinstance(sample, int)
              else sample.numpy() % 2 ** 32)
    w = words(np.arange(-(-size // 4)), sample[:, None], step, stream, seed % 2 ** 32, seed >> 32)
    n = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        u = (a.astype(np.float32) * np.float32(2.0 ** -32)
             + np.float32(2.0 ** -33)).astype(np.float64)
        v = b.astype(np.uint32).view(np.int32).astype(np.float32).astype(np.float64) / 2 ** 32
        r = np.sqrt(-2 * np.log(u))
        n += [r * np.cos(2 * np.pi * v), r * np.sin(2 * np.pi * v)]
    return torch.from_numpy(np.stack(n, -1).reshape(rows, -1)[:, :size].reshape(shape).copy())


def ulps(a, b):
    """Distance of two 16-bit tensors in units of the last place."""
    a, b = (t.contiguous().view(torch.int16).int() for t in (a, b))
    a, b = (torch.where(t < 0, -(t & 0x7FFF), t) for t in (a, b))
    return (a - b).abs()


# ------------------------------------------------------------------------------------ inside a moat

def moat(t, channels_last=False, fill=NAN):
    """A copy of t (B, ...) with gaps around and between its rows, filled with `fill`; and the
    buffer."""
    t = t.contiguous(memory_format=torch.channels_last) if channels_last else t.contiguous()
    size, gap = t[0].numel(), 5
    buffer = torch.full((t.shape[0] * (size + gap) + 64,), fill, dtype=t.dtype)
    view = buffer.as_strided(t.shape, (size + gap, *t.stride()[1:]), 32)
    view.copy_(t)
    return view, buffer


def untouched(view, buffer, fill):
    """Whether all of the buffer outside the view still holds `fill`."""
    rest = buffer.clone()
    rest.as_strided(view.shape, view.stride(), 32).fill_(fill)
    return bool((rest == fill).all())


def close(actual, expected, dtype=torch.float32, what=""):
    """float32 to 1e-5; 16-bit to one unit in the last place."""
    if dtype == torch.float32:
        torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-5, atol=1e-5,
                                   msg=lambda m: f"{what}: {m}")
    else:
        assert int(ulps(actual, expected.to(dtype)).max()) <= 1, what


# 4-D, 2-D, 1-D; more than one tile; no power of two; sizes that four does not divide
SHAPES = ((2, 3, 5, 7), (3, 2), (2,), (1, 1, 41, 53), (2, 4, 4, 4), (1, 5, 1, 1), (2, 3, 17, 23))
RNG = (((7 << 40) + 12345, 3, 4, 5), (2 ** 64 - 1, 2 ** 32 - 3, 2 ** 31 + 5, 2 ** 32 - 1))


def interpret_noise():
    from kernels import noise
    assert noise.triton is not None
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rng in RNG:
                size = torch.Size(shape).numel()
                buffer = torch.full((size + 64,), 99.0, dtype=dtype)
                y = buffer[32:32 + size].view(shape)
                noise._randn_triton(y, *rng)
                close(y, normals(shape, *rng), dtype, f"randn {shape} {dtype} {rng}")
                assert (buffer[:32] == 99).all() and (buffer[32 + size:] == 99).all()
    # One kernel call with everything on the device; the twin draws the same.
    sample = torch.tensor([9, 2 ** 32 - 1, 0])
    y = torch.empty(3, 2, 9, 11)
    noise._randn_triton(y, torch.tensor(-5), sample, torch.tensor(2 ** 31 + 1), 8)
    close(y, normals(y.shape, -5, sample, 2 ** 31 + 1, 8))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = torch.empty(2, 3, *((128, 128) if dtype == torch.float32 else (64, 64)), dtype=dtype)
        noise._randn_triton(y, 1, 0, 0, 0)
        close(y, noise.randn(y.shape, 1, dtype=dtype), dtype, f"twin {dtype}")
        if dtype == torch.float32:  # the smallest normals, too, are right in proportion
            torch.testing.assert_close(y.double(), normals(y.shape, 1, 0, 0, 0), rtol=5e-6, atol=0)


def interpret_diffuse():
    from kernels import diffuse
    assert diffuse.triton is not None
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for shape in SHAPES:
        for last in (False, True)[:1 + (len(shape) == 4)]:
            rows, rng = shape[0], RNG[len(shape) % 2]
            n = normals(shape, *rng)
            per_row = lambda v: v.double().view(-1, *[1] * (len(shape) - 1))  # noqa: E731
            a, s, flip = torch.rand(rows), torch.rand(rows), torch.arange(rows) % 2 == 0
            for dtype in (torch.uint8, *kinds):
                pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
                x = pixels if dtype == torch.uint8 else torch.randn(shape).to(dtype)
                to = torch.float32 if dtype == torch.uint8 else dtype
                for mirrored in (None, flip)[:1 + (len(shape) > 1)]:
                    xm, _ = moat(x, last, 201 if dtype == torch.uint8 else NAN)
                    x_t, box = moat(torch.zeros(shape, dtype=to), last, 99.0)
                    eps, box_eps = moat(torch.zeros(shape, dtype=to), last, 99.0)
                    diffuse._add_noise_triton(xm, a, s, rng, mirrored, x_t, eps)
                    ref = x.double() / 127.5 - 1 if dtype == torch.uint8 else x.double()
                    if mirrored is not None:
                        ref = torch.stack([r.flip(-1) if f else r for r, f in zip(ref, flip)])
                    what = (f"add_noise {shape} {dtype} channels_last={last} "
                            f"flip={mirrored is not None}")
                    if to == torch.float32:
                        close(x_t, per_row(a) * ref + per_row(s) * n, to, what)
                    else:  # a sum can cancel: absolute where it is small
                        torch.testing.assert_close(
                            x_t.double(), per_row(a) * ref + per_row(s) * n, msg=what,
                            rtol=torch.finfo(to).eps, atol=2e-6)
                    close(eps, n, to, what)
                    assert untouched(x_t, box, 99.0) and untouched(eps, box_eps, 99.0), what

            for dtype, cases in zip(kinds, (range(4), (1, 2), (3,))):
                x, out, unc, std = (torch.randn(shape) for _ in range(4))
                out, unc, std = out.to(dtype), unc.to(dtype), std.abs().to(dtype)
                for case in cases:
                    guided, clip, learned, table = (case in (1, 3), case in (1, 2), case == 2,
                                                    case in (0, 3))
                    coef = torch.randn(rows, 5) if table else torch.randn(5)
                    guidance = torch.rand(rows) * 4 if case == 3 else 1.7
                    ins = [moat(t, last)[0] for t in (x, out, unc, std)]
                    y, box = moat(torch.zeros(shape), last, 99.0)
                    x0, box_x0 = moat(torch.zeros(shape), last, 99.0)
                    diffuse._denoise_triton(
                        ins[0], ins[1], coef, rng, ins[2] if guided else None, guidance, clip,
                        ins[3] if learned else None, y, x0 if case else None)
                    ref = [t.double().requires_grad_() for t in (x, out, unc)]
                    g = per_row(guidance) if case == 3 else 1.7
                    o = ref[2] + g * (ref[1] - ref[2]) if guided else ref[1]
                    k = [per_row(c) if table else c.double() for c in coef.unbind(-1)]
                    x0_ref = k[0] * ref[0] + k[1] * o
                    x0_ref = x0_ref.clamp(-1, 1) if clip else x0_ref
                    y_ref = k[2] * ref[0] + k[3] * x0_ref + (std.double() if learned else k[4]) * n
                    what = f"denoise {shape} {dtype} channels_last={last} case {case}"
                    close(y, y_ref.detach(), what=what)
                    assert untouched(y, box, 99.0) and untouched(x0, box_x0, 99.0), what
                    if case:
                        close(x0, x0_ref.detach(), what=what)

                    # Backward, with a gradient of x0 in half of the cases.
                    gy, gx0 = torch.randn(shape), torch.randn(shape)
                    loss = (y_ref * gy).sum() + ((x0_ref * gx0).sum() if case % 2 else 0.0)
                    want = torch.autograd.grad(loss, ref, allow_unused=True)
                    grads = [moat(torch.zeros(shape, dtype=t.dtype), last, 99.0)
                             for t in (x, out, unc)]
                    diffuse._denoise_backward_triton(
                        moat(gy, last)[0], moat(gx0, last)[0] if case % 2 else None,
                        *(ins[:3] if clip else [None] * 3), coef, guidance, clip, guided,
                        grads[0][0], grads[1][0], grads[2][0] if guided else None)
                    for (got, box), expected, kind in zip(
                            grads, want, (torch.float32, dtype, dtype)):
                        if expected is not None:
                            rtol = 1e-5 if kind == torch.float32 else torch.finfo(kind).eps
                            torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=rtol,
                                                       msg=lambda m: f"{what}: {m}")
                        assert untouched(got, box, 99.0), what

    # By autograd: mixed layouts, a slice of twice the channels, a transposed picture, expanded
    # gradients.
    rng = (3, 1, 4, 1)
    x = torch.randn(2, 3, 6, 4).to(memory_format=torch.channels_last).requires_grad_()
    out = torch.randn(2, 6, 6, 4)[:, :3].detach().requires_grad_()
    unc = torch.randn(2, 3, 4, 6).transpose(2, 3).bfloat16().detach().requires_grad_()
    coef = torch.randn(2, 5)
    for clip in (False, True):
        y, x0 = diffuse._DenoiseStep.apply(x, out, unc, coef, rng, 2.5, clip, None, True)
        assert y.stride() == x.stride()
        y2, x2 = diffuse.denoise_step(x, out, coef, *rng, out_uncond=unc, guidance=2.5, clip=clip,
                                      return_x0=True)
        close(y, y2), close(x0, x2)
        for f in (lambda y, x0: y.sum(), lambda y, x0: (x0 ** 2).sum(),
                  lambda y, x0: (y * x0).sum()):
            got, want = (torch.autograd.grad(f(*v), (x, out, unc), retain_graph=True)
                         for v in ((y, x0), (y2, x2)))
            for p, q in zip(got, want):
                torch.testing.assert_close(
                    p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        twice = []  # a gradient that is differentiated again, as penalties do: not cut
        for v in (y, x0), (y2, x2):
            first = torch.autograd.grad((v[0] ** 2).sum() + (v[0] * v[1]).sum(), (x, out),
                                        create_graph=True)
            twice.append(torch.autograd.grad(
                sum((g ** 2).sum() for g in first) + v[0].sum(), (x, out)))
        for p, q in zip(*twice):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    # Exact ends: black is -1 and white 1, nothing beyond.
    ends, y = torch.tensor([[0, 255, 1, 254]], dtype=torch.uint8), torch.empty(1, 4)
    diffuse._add_noise_triton(ends, torch.ones(1), torch.zeros(1), rng, None, y, None)
    assert y[0, :2].tolist() == [-1.0, 1.0] and y.abs().max() <= 1
    a, s, flip = torch.rand(2), torch.rand(2), torch.tensor([True, False])
    v = (diffuse._AddNoise.apply(x, a, s, rng, flip, True),
         diffuse.add_noise(x, a, s, *rng, flip=flip))
    assert v[0][0].stride() == x.stride() and not v[0][1].requires_grad
    close(v[0][0], v[1][0]), close(v[0][1], v[1][1])
    torch.testing.assert_close(*(torch.autograd.grad((x_t ** 2).sum(), x)[0] for x_t, _ in v))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert os.environ.get("TRITON_INTERPRET") == "1"
    with np.errstate(over="ignore"):
        {"noise": interpret_noise, "diffuse": interpret_diffuse}[sys.argv[1]]()
    print("ok")
