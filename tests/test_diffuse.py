"""kernels/diffuse.py: the papers' updates in float64, gradients, layouts, and the kernels
themselves."""
import math

import pytest
import torch
from interp_noise_diffuse import normals

from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn

SEED = 0x0123456789ABCDEF
RNG = dict(seed=SEED, sample=7, step=3, stream=2)
SHAPE = (3, 2, 5, 7)


def rows(v):
    return v.double().view(-1, 1, 1, 1)


def eps_of(shape):
    return normals(shape, *RNG.values())


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def test_add_noise_float(g):
    x, a, s = (torch.randn(SHAPE, generator=g), torch.rand(3, generator=g),
               torch.rand(3, generator=g))
    x_t, eps = add_noise(x, a, s, **RNG)
    assert x_t.dtype == eps.dtype == torch.float32
    torch.testing.assert_close(eps.double(), eps_of(SHAPE), rtol=1e-6, atol=0)
    want = rows(a) * x.double() + rows(s) * eps_of(SHAPE)
    torch.testing.assert_close(x_t.double(), want, rtol=1e-6, atol=1e-6)


def test_add_noise_uint8_and_flip(g):
    x = torch.randint(0, 256, SHAPE, generator=g, dtype=torch.uint8)
    x[0, 0, 0, :2] = torch.tensor([0, 255])  # exactly -1 and 1
    flip, one, zero = torch.tensor([False, True, True]), torch.ones(3), torch.zeros(3)
    x0 = x.double() / 127.5 - 1
    x0[1:] = x0[1:].flip(-1)
    got, eps = add_noise(x, one, zero, **RNG, flip=flip)
    assert (got.dtype == eps.dtype == torch.float32 and got[0, 0, 0, 0] == -1
            and got[0, 0, 0, 1] == 1)
    torch.testing.assert_close(got.double(), x0, rtol=0, atol=2e-7)
    assert torch.equal(eps, randn(SHAPE, **RNG))  # the picture is mirrored, the noise is not
    a, s = torch.rand(3, generator=g), torch.rand(3, generator=g)
    for shape in (SHAPE, (3, 70)):
        x_t, eps = add_noise(x.view(shape), a, s, **RNG)
        torch.testing.assert_close(x_t.double().view(SHAPE), rows(a) * (x.double() / 127.5 - 1)
                                   + rows(s) * eps_of(SHAPE), rtol=1e-6, atol=1e-6)
    assert torch.equal(add_noise(x, a, s, **RNG, flip=flip, return_eps=False),
                       add_noise(x, a, s, **RNG, flip=flip)[0])
    again, _ = add_noise(x0.float(), one, zero, **RNG, flip=flip)
    torch.testing.assert_close(again.double()[1:], x.double()[1:] / 127.5 - 1, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_rounded_once(g, dtype):
    x, out = (torch.randn(SHAPE, generator=g).to(dtype) for _ in range(2))
    a = torch.rand(3, generator=g)
    x_t, eps = add_noise(x, a, 1 - a, **RNG)
    wide, wide_eps = add_noise(x.float(), a, 1 - a, **RNG)
    assert torch.equal(x_t, wide.to(dtype)) and torch.equal(eps, wide_eps.to(dtype))
    coef = torch.tensor([1.1, -0.3, 0.4, 0.6, 0.2])
    wide = denoise_step(x.float(), out.float(), coef, **RNG)
    # state float32, prediction 16-bit
    assert torch.equal(denoise_step(x.float(), out, coef, **RNG), wide)
    assert torch.equal(denoise_step(x, out, coef, **RNG), wide.to(dtype))


def alpha_bar(T=1000):
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
    return torch.cat([torch.ones(1, dtype=torch.float64), bars])


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_posterior(g, clip):
    """Ho 2020, algorithm 2 and equations 6, 7, with t = 1, 2 and 1000 in one batch."""
    bar, t = alpha_bar(), torch.tensor([1, 2, 1000])
    b, b_prev = bar[t], bar[t - 1]
    beta = 1 - b / b_prev
    x, out = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    std = ((1 - b_prev) / (1 - b) * beta).sqrt()
    coef = torch.stack([b ** -0.5, -(1 / b - 1).sqrt(), (1 - beta).sqrt() * (1 - b_prev) / (1 - b),
                        b_prev.sqrt() * beta / (1 - b), std], 1).float()
    got, x0 = denoise_step(x, out, coef, **RNG, clip=clip, return_x0=True)
    want_x0 = (x.double() - rows((1 - b).sqrt()) * out) / rows(b.sqrt())
    if clip:
        want_x0 = want_x0.clamp(-1, 1)
        want = rows(b_prev.sqrt() * beta) * want_x0 + rows((1 - beta).sqrt() * (1 - b_prev)) * x
        want = want / rows(1 - b)
    else:  # equation 11: the mean straight from eps
        want = (x - rows(beta / (1 - b).sqrt()) * out.double()) / rows((1 - beta).sqrt())
    # float32 coefficients: 1 / sqrt(alpha_bar[1000]) = 158 magnifies their rounding
    torch.testing.assert_close(x0.double(), want_x0, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.double(), want + rows(std) * eps_of(SHAPE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("s, t", [(0, 100), (300, 400)])
def test_ddim(g, eta, s, t):
    """Song 2020, equations 12 and 16; eps re-derived from the clamped x0."""
    bar = alpha_bar()
    b, b_prev = bar[t], bar[s]
    sigma = eta * ((1 - b_prev) / (1 - b) * (1 - b / b_prev)).sqrt()
    k = (1 - b_prev - sigma ** 2).sqrt()
    x, out = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    coef = torch.stack([b ** -0.5, -(1 / b - 1).sqrt(), k / (1 - b).sqrt(),
                        b_prev.sqrt() - k * (b / (1 - b)).sqrt(), sigma]).float()
    x0 = ((x.double() - (1 - b).sqrt() * out) / b.sqrt()).clamp(-1, 1)
    want = b_prev.sqrt() * x0 + k * (x - b.sqrt() * x0) / (1 - b).sqrt() + sigma * eps_of(SHAPE)
    got = denoise_step(x, out, coef, **RNG, clip=True).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if s == 0:  # the last step gives x0 itself
        torch.testing.assert_close(got, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c_n", [0.0, 100.0])  # neither may count beside std
def test_guidance_and_learned_variance(g, c_n):
    x, out, unc, std = (torch.randn(SHAPE, generator=g) for _ in range(4))
    std, w = std.abs(), torch.tensor([0.0, 1.0, 4.5])
    coef = torch.tensor([0.0, 1.0, 0.0, 1.0, c_n])  # x_prev = o + noise
    want = unc.double() + rows(w) * (out.double() - unc) + std.double() * eps_of(SHAPE)
    got = denoise_step(x, out, coef, **RNG, out_uncond=unc, guidance=w, std=std)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for i, v in enumerate(w):
        one = denoise_step(x, out, coef, **RNG, out_uncond=unc, guidance=float(v), std=std)
        torch.testing.assert_close(one[i], got[i])


def test_no_noise_is_exact(g):
    """c_n = 0: not a bit of the noise, in a table whose other rows have some."""
    x, out = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    coef = torch.randn(3, 5, generator=g)
    coef[1, 4] = 0
    clean = coef.clone()
    clean[:, 4] = 0
    got, exact = denoise_step(x, out, coef, **RNG), denoise_step(x, out, clean, **RNG)
    assert torch.equal(got[1], exact[1]) and not torch.equal(got[0], exact[0])
    p_x, p_out, c_x, c_0, _ = (c.view(-1, 1, 1, 1) for c in clean.unbind(1))
    assert torch.equal(exact, c_x * x + c_0 * (p_x * x + p_out * out))
    # one row for all; the same sample index
    row = denoise_step(x[2:], out[2:], coef[2], SEED, 7 + 2, 3, 2)
    assert torch.equal(row, got[2:])


def test_nan_is_reported_not_scrubbed():
    x = torch.full((1, 4), math.nan)
    assert torch.isnan(denoise_step(x, x, torch.ones(5), clip=True)).all()


def test_memory_layout_does_not_matter(g):
    x, out = torch.randn(2, 3, 6, 4, generator=g), torch.randn(2, 3, 6, 4, generator=g)
    a, coef = torch.rand(2, generator=g), torch.randn(2, 5, generator=g)
    flip = torch.tensor([True, False])
    want_t, want_eps = add_noise(x, a, a, **RNG, flip=flip)
    want = denoise_step(x, out, coef, **RNG, clip=True)
    wide = torch.zeros(2, 6, 6, 4)
    wide[:, :3] = x
    last = dict(memory_format=torch.channels_last)
    for y in (x.to(**last), x.transpose(2, 3).contiguous().transpose(2, 3), wide[:, :3],
              x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        assert torch.equal(y, x)
        x_t, eps = add_noise(y, a, a, **RNG, flip=flip)
        assert torch.equal(x_t, want_t) and torch.equal(eps, want_eps)
        assert torch.equal(denoise_step(y, out.to(**last), coef, **RNG, clip=True), want)


def test_gradients(g):
    """float64 against finite differences, first and second order."""
    def new(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul_(2).requires_grad_()

    x, a, s = new(2, 2, 3), new(2), new(2)
    flip = torch.tensor([True, False])
    for f in (None, flip):
        assert torch.autograd.gradcheck(lambda *v: add_noise(*v, **RNG, flip=f)[0], (x, a, s))
    x_t, eps = add_noise(x, a, s, **RNG)
    assert x_t.requires_grad and not eps.requires_grad

    out, unc, coef, w, std = new(2, 2, 3), new(2, 2, 3), new(2, 5), new(2), new(2, 2, 3)
    for clip in (False, True):
        def step(x, out, unc, coef, w, std, clip=clip):
            y, x0 = denoise_step(x, out, coef, **RNG, out_uncond=unc, guidance=w, clip=clip,
                                 std=std, return_x0=True)
            return y, x0, denoise_step(x, out, coef, **RNG, clip=clip)
        inputs = (x, out, unc, coef, w, std)
        assert torch.autograd.gradcheck(step, inputs)
        assert torch.autograd.gradgradcheck(step, inputs)
        x0 = step(*inputs)[1].detach().abs()
        # both sides of the clamp were tried
        assert not clip or ((x0 == 1).any() and (x0 < 1).any())


def test_gradient_of_float32_state_and_16_bit_prediction(g):
    x, out = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g).bfloat16()
    x.requires_grad_(), out.requires_grad_()
    coef = torch.tensor([1.0, -0.5, 0.4, 0.6, 0.2])
    dx, do = torch.autograd.grad(denoise_step(x, out, coef, **RNG).sum(), (x, out))
    torch.testing.assert_close(dx, torch.full(SHAPE, 0.4 + 0.6))
    torch.testing.assert_close(do, torch.full(SHAPE, 0.6 * -0.5).bfloat16())
    with torch.no_grad():
        assert not denoise_step(x, out, coef, **RNG).requires_grad


def test_zero_sizes():
    empty, no = torch.empty(0, 3, 4), torch.empty(0)
    x_t, eps = add_noise(empty.to(torch.uint8), no, no, 1, flip=no.bool())
    assert x_t.shape == eps.shape == (0, 3, 4) and x_t.dtype == torch.float32
    assert denoise_step(empty, empty, torch.ones(5), clip=True).shape == (0, 3, 4)
    y, x0 = denoise_step(empty, empty, torch.ones(0, 5), return_x0=True, std=empty)
    assert y.shape == x0.shape == (0, 3, 4)


@pytest.mark.parametrize("change, word", [
    (dict(x0=torch.zeros(2, 3, dtype=torch.int64)), "x0"), (dict(x0=torch.tensor(1.0)), "x0"),
    (dict(x0=[1.0]), "x0"),
    (dict(a=torch.ones(3)), "a must"), (dict(a=1.0), "a must"),
    (dict(s=torch.ones(2, 1)), "s must"), (dict(s=torch.ones(2, dtype=torch.int64)), "s must"),
    (dict(s=torch.ones(2, device="meta")), "move it"),
    (dict(flip=torch.ones(2)), "flip"), (dict(flip=torch.ones(3, dtype=torch.bool)), "flip"),
    (dict(step=-1), "step"), (dict(seed=2 ** 64), "seed"),
    (dict(x0=torch.zeros(2), flip=torch.ones(2, dtype=torch.bool)), "last axis"),
    (dict(sample=torch.zeros(3, dtype=torch.int64)), "sample"),
])
def test_bad_arguments_of_add_noise(change, word):
    good = dict(x0=torch.zeros(2, 3), a=torch.ones(2), s=torch.ones(2), seed=0)
    with pytest.raises(ValueError, match=word) as error:
        add_noise(**good | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, word", [
    (dict(x=torch.zeros(2, 3, dtype=torch.uint8)), "x must"), (dict(x=None), "x must"),
    (dict(out=None), "out must"), (dict(out=torch.zeros(2, 4)), "out must"),
    (dict(out=torch.zeros(2, 3, dtype=torch.int32)), "out must"),
    (dict(out_uncond=torch.zeros(1, 3)), "out_uncond must"), (dict(std=torch.zeros(2)), "std must"),
    (dict(std=torch.zeros(2, 3, device="meta")), "move it"), (dict(coef=torch.ones(4)), "coef"),
    (dict(coef=torch.ones(3, 5)), "coef"), (dict(coef=torch.ones(5, dtype=torch.float64)), "coef"),
    (dict(coef=[1, 1, 1, 1, 1]), "coef"), (dict(guidance=torch.ones(3)), "guidance"),
    (dict(guidance="2"), "guidance"),
    (dict(stream=2 ** 32), "stream"),
])
def test_bad_arguments_of_denoise_step(change, word):
    good = dict(x=torch.zeros(2, 3), out=torch.zeros(2, 3), coef=torch.ones(5))
    with pytest.raises(ValueError, match=word) as error:
        denoise_step(**good | change)
    assert "\n" not in str(error.value)


def test_traced_whole_by_torch_compile(g):
    """One graph, no breaks, seed and step as tensors; what it draws is what a plain run draws."""
    x, o = torch.randn(2, *SHAPE, generator=g).requires_grad_().unbind()
    u, a, coef = (torch.randint(0, 256, SHAPE, generator=g, dtype=torch.uint8),
                  torch.rand(3, generator=g), torch.randn(5, generator=g))
    seed, step = torch.tensor(-5), torch.tensor(7)
    for call in (lambda: add_noise(u, a, 1 - a, seed, 4, step, 1, flip=a > 0.5),
                 lambda: denoise_step(x, o, coef, seed, 4, step, 1, clip=True, return_x0=True),
                 lambda: randn(SHAPE, 2 ** 63 + 5, 4, step, dtype=torch.bfloat16)):
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(), call())
    traced, plain = (
        torch.autograd.grad(
            f(lambda x: denoise_step(x, 2 * x, coef, seed, clip=True))(x).square().sum(), x)
        for f in (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), lambda f: f))
    torch.testing.assert_close(traced, plain)


def test_transforms_take_the_twin(g):
    """A tangent, a vmap and a functional gradient are never lost: there `traced` says that a kernel
    cannot be launched."""
    from kernels import noise
    x, o, coef = (torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g),
                  torch.tensor([1.1, -0.4, 0.3, 0.6, 0.0]))
    seen = []

    def f(o):
        seen.append(noise.traced(o))
        return denoise_step(x, o, coef)
    tangent = torch.autograd.forward_ad
    with tangent.dual_level():
        y = tangent.unpack_dual(f(tangent.make_dual(o, torch.ones_like(o))))
        torch.testing.assert_close(y.tangent, torch.full_like(o, -0.24))
    torch.testing.assert_close(torch.func.grad(lambda o: f(o).sum())(o), torch.full_like(o, -0.24))
    torch.testing.assert_close(torch.func.jvp(f, (o,), (torch.ones_like(o),))[1],
                               torch.full_like(o, -0.24))
    assert seen and all(seen) and not noise.traced(o)


@pytest.mark.program("diffuse")
def test_kernels_in_the_interpreter(program):
    assert program.endswith("ok\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_agrees_with_the_twin(g, layout, dtype):
    shape, tol = (4, 3, 37, 29), dict(rtol=1e-5, atol=2e-5)
    tol_out = tol if dtype == torch.float32 else dict(rtol=torch.finfo(dtype).eps, atol=1e-3)
    x, out, unc = (torch.randn(shape, generator=g) for _ in range(3))
    out, unc = out.to(dtype), unc.to(dtype)
    coef, a = torch.randn(4, 5, generator=g), torch.rand(4, generator=g)
    flip, pixels = (torch.tensor([True, False, True, False]),
                    torch.randint(0, 256, shape, dtype=torch.uint8))

    def both(f, *tensors):
        for device in ("cpu", "cuda"):
            moved = [t.to(device) for t in tensors]
            yield f(*[t.to(memory_format=layout) if t.dim() == 4 else t for t in moved])

    for data in (pixels, x, out):
        want, got = both(lambda d, a, f: add_noise(d, a, 1 - a, **RNG, flip=f), data, a, flip)
        for p, q in zip(got, want):
            torch.testing.assert_close(p.cpu(), q, **(tol_out if data is out else tol))

    def step(x, out, unc, coef, clip):
        leaves = [t.requires_grad_() for t in (x, out, unc)]
        y, x0 = denoise_step(x, out, coef, **RNG, out_uncond=unc, guidance=1.7, clip=clip,
                             return_x0=True)
        return [y.detach(), x0.detach(),
                *torch.autograd.grad(y.sin().sum() + (x0 ** 2).sum(), leaves)]

    for clip in (False, True):
        want, got = both(lambda *t: step(*(v.detach().clone() for v in t), clip), x, out, unc, coef)
        for p, q in zip(got, want):
            bound = tol if q.dtype == torch.float32 else tol_out
            near = torch.isclose(p.cpu().double(), q.double(), **bound)
            assert near.float().mean() > 0.9999  # an x0 on the clamp's edge may fall on either side


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_graph_replay_draws_fresh_noise():
    x, coef = torch.zeros(2, 3, 8, 8, device="cuda"), torch.tensor([0.0, 0, 0, 0, 1], device="cuda")
    seed, step = (torch.tensor(v, device="cuda") for v in (SEED, 0))
    denoise_step(x, x, coef, seed, 0, step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = denoise_step(x, x, coef, seed, 0, step)
    for k in (1, 2):
        step.fill_(k)
        graph.replay()
        torch.testing.assert_close(y.cpu(), randn(x.shape, SEED, 0, k), rtol=0, atol=1e-5)
