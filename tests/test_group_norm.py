"""kernels/group_norm.py: the plain twin here; the kernels in a program of their own,
interpreted."""
import pytest
import torch
import torch.nn.functional as F

from common.unet import UNet
from kernels.group_norm import GroupNorm, group_norm

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# of one rounding
EPSILON = {torch.float32: 2 ** -24, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    """The twin everywhere, and the kernels where they run."""
    return request.param


def closed_form(x, groups, weight, bias, scale, shift, silu=True, eps=1e-5):
    """The definition, in the inputs' own dtype (float64 here), with no operation that the twin
    uses."""
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    xhat = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    column = lambda v: v.reshape(*v.shape, *[1] * (x.dim() - 2))
    z = xhat * column(weight[None]) + column(bias[None])
    z = z if scale is None else z * (1 + column(scale))
    z = z if shift is None else z + column(shift)
    return z / (1 + torch.exp(-z)) if silu else z


def eager(x, groups, weight, bias, scale, shift, silu=True, eps=1e-5):
    """What one would write: F.group_norm, multiply, add, F.silu."""
    column = lambda v: v.reshape(*v.shape, *[1] * (x.dim() - 2))
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    y = y if scale is None else y * (1 + column(scale))
    y = y if shift is None else y + column(shift)
    return F.silu(y) if silu else y


def inputs(shape, dtype=torch.float32, adaptive=True, mean=1.0, std=2.0,
           layout=torch.contiguous_format, device="cpu"):
    """x, weight, bias, scale, shift, dy. bf16 holds the weights: plain PyTorch in bf16 has the same
    ones."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16().float().to(device)
    x = (draw(*shape) * std + mean).to(dtype).contiguous(memory_format=layout)
    scale, shift = draw(shape[0], 2 * shape[1]).to(dtype).chunk(2, 1) if adaptive else (None, None)
    return x, draw(shape[1]), draw(shape[1]), scale, shift, draw(*shape).to(dtype)


def gradients(function, x, weight, bias, scale, shift, dy, groups, dtype=None, **options):
    """[y, dx, dweight, dbias, dscale, dshift] (None left out), computed in `dtype`, as float64."""
    given = [v if v is None else v.detach().to(dtype or v.dtype).requires_grad_()
             for v in (x, weight, bias, scale, shift)]
    y = function(given[0], groups, *given[1:], **options)
    grads = torch.autograd.grad(y, [v for v in given if v is not None], dy.to(y.dtype))
    return [v.double() for v in (y, *grads)]


def assert_no_worse(ours, plain, exact, dtype, factor=2):
    """Root mean square error at most `factor` times plain PyTorch's, or three roundings of the
    maximum."""
    for name, a, b, c in zip(
            ("y", "dx", "dweight", "dbias", "dscale", "dshift"), ours, plain, exact):
        rms = lambda v: (v - c).square().mean().sqrt().item()
        bound = max(factor * rms(b), 3 * EPSILON[dtype] * c.abs().max().item())
        assert rms(a) <= bound, (name, rms(a), rms(b))


SHAPES = [((3, 12, 5, 7), 4), ((2, 32, 3, 3), 1), ((2, 7, 9), 7), ((4, 64), 8), ((2, 96, 4, 4), 32),
          ((2, 64, 5, 5), 2), ((1, 24, 2, 3, 5), 3), ((5, 1, 8, 8), 1), ((2, 1024, 1, 2), 32)]


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_error_at_most_twice_eager(shape, groups, dtype, device):
    for adaptive, silu in ((True, True), (True, False), (False, True)):
        case = (*inputs(shape, dtype, adaptive, device=device), groups)
        assert_no_worse(*(gradients(f, *case, dtype=t, silu=silu) for f, t in
                          ((group_norm, None), (eager, None), (closed_form, torch.float64))), dtype)


def test_scale_alone_and_shift_alone(device):
    x, weight, bias, scale, shift, dy = inputs((3, 6, 4, 4), device=device)
    for s, t in ((scale, None), (None, shift)):
        ours, exact = (gradients(f, x, weight, bias, s, t, dy, 3, dtype=d) for f, d in
                       ((group_norm, None), (closed_form, torch.float64)))
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adaptive", (True, False))
def test_large_mean(adaptive, device):
    # mean / std = 1000: x and the mean are good to 6e-5, y to 1e-4; E[x^2] - mean^2 would be wrong
    # by 0.1
    x, weight, bias, scale, shift, dy = inputs((4, 32, 9, 9), adaptive=adaptive, std=1,
                                               device=device)
    case = (x + 1000, weight, bias, scale, shift, dy, 8)
    ours, plain, exact = (gradients(f, *case, dtype=t) for f, t in
                          ((group_norm, None), (eager, None), (closed_form, torch.float64)))
    # eps of 1000 in each: their luck differs
    assert_no_worse(ours, plain, exact, torch.float32, factor=3)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-3, atol=1e-3)


def test_constant_and_extreme_values():
    one = torch.ones(8)
    y = group_norm(torch.full((2, 8, 4, 4), 3.0), 2, one, one)  # no variance: xhat = 0
    # rounding / sqrt(eps)
    torch.testing.assert_close(y, F.silu(torch.ones_like(y)), rtol=0, atol=1e-4)
    x, shift = torch.randn(2, 8, 4, 4).requires_grad_(), torch.tensor([1e4, -1e4]).repeat(2, 4)
    y = group_norm(x, 2, one, one, shift=shift)  # SiLU far out: z, and 0
    torch.testing.assert_close(y[:, 1::2], torch.zeros(2, 4, 4, 4))
    assert (y[:, ::2] > 9e3).all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("adaptive", (True, False))
def test_gradcheck_twice(adaptive):
    case = inputs((2, 4, 2, 2), adaptive=adaptive)[:5]
    rest = [v.double().requires_grad_() for v in case if v is not None]
    function = lambda x, *others: group_norm(x, 2, *others, eps=1e-3)
    assert torch.autograd.gradcheck(function, rest)
    assert torch.autograd.gradgradcheck(function, rest)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_double_backward(dtype, device):
    """R1's shape: the gradient of a squared gradient, against float64."""
    def penalty(function, case, dtype):
        *given, _ = [v.detach().to(dtype or v.dtype).requires_grad_() for v in case]
        y = function(given[0], 4, *given[1:])
        (dx,) = torch.autograd.grad(y.float().sum(), given[0], create_graph=True)
        grads = torch.autograd.grad(dx.to(dtype or torch.float32).square().sum(), given)
        return [v.double() for v in grads]

    case = inputs((3, 16, 6, 6), dtype, device=device)
    ours, plain, exact = (penalty(f, case, t) for f, t in
                          ((group_norm, None), (eager, None), (closed_form, torch.float64)))
    for a, b, c in zip(ours, plain, exact):
        assert (a - c).norm() <= max(2 * (b - c).norm(), 1e-4 * c.norm())


@pytest.mark.parametrize("shape, layout", (((2, 12, 5, 7), torch.channels_last),
                                           ((2, 6, 2, 3, 4), torch.channels_last_3d)), ids=str)
@pytest.mark.parametrize("adaptive", (True, False))
def test_channels_last(shape, layout, adaptive, device):
    case = inputs(shape, adaptive=adaptive, layout=layout, device=device)
    assert group_norm(case[0], 3, *case[1:5]).is_contiguous(memory_format=layout)
    ours, exact = (gradients(group_norm, *case, 3),
                   gradients(closed_form, *case, 3, dtype=torch.float64))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_any_strides(device):
    x, weight, bias, scale, shift, dy = inputs((4, 6, 5, 8), device=device)
    turned, sliced = x.transpose(2, 3), x[::2, :, 1:, ::2]
    for v, s, t in ((turned, scale, shift), (sliced, scale[::2], shift[::2])):
        exact = closed_form(v.double(), 2, *(u.double() for u in (weight, bias, s, t)))
        torch.testing.assert_close(group_norm(v, 2, weight, bias, s, t), exact.float())


def test_autocast():
    """bf16 in, bf16 out, fp32 statistics and parameters: at mean 30, bf16 statistics would be off
    by 0.1."""
    x, weight, bias, scale, shift, dy = inputs((4, 32, 8, 8), torch.bfloat16, mean=30, std=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm(x, 8, weight, bias, scale, shift).dtype == torch.bfloat16
        assert group_norm(x.float(), 8, weight, bias).dtype == torch.float32
        case = (x, weight, bias, scale, shift, dy, 8)
        ours, plain = gradients(group_norm, *case), gradients(eager, *case)
    assert_no_worse(ours, plain, gradients(closed_form, *case, dtype=torch.float64), torch.bfloat16)


@pytest.mark.parametrize("shape", ((0, 6, 4, 4), (0, 6), (2, 6, 0)))
def test_empty(shape, device):
    for adaptive in (True, False):
        y, *grads = gradients(group_norm, *inputs(shape, adaptive=adaptive, device=device), 3)
        assert y.shape == shape and not any(g.any() for g in grads)


def test_module():
    norm = GroupNorm(4, 12)
    assert {k: tuple(v.shape) for k, v in norm.state_dict().items()} == {
        "weight": (12,), "bias": (12,)}
    x, weight, bias, scale, shift, _ = inputs((2, 12, 4, 4))
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 4)))
    norm.load_state_dict({"weight": weight, "bias": bias})
    expected = eager(x, 4, weight, bias, scale, shift)
    torch.testing.assert_close(norm(x, scale, shift), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(GroupNorm(3, 12, silu=False)(x), F.group_norm(x, 3))
    for groups, channels in ((5, 12), (0, 12), (-3, 12), (1, 0)):
        with pytest.raises(ValueError, match="channels"):
            GroupNorm(groups, channels)


def test_network_in_one_graph_for_every_batch():
    """dynamic=True makes symbols of numbers: no check may ask what only a known number can
    answer."""
    torch.manual_seed(0)
    net = UNet(1, size=8, width=8, multipliers=(1, 2), blocks=1, attention=())
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)  # else the last layer's zeros would hide all others
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3):
        x, t = torch.randn(batch, 1, 8, 8), torch.rand(batch)
        found = []
        for f in (net, compiled):
            net.zero_grad()
            y = f(x, t)
            y.square().sum().backward()
            found.append([y, *(p.grad for p in net.parameters())])
        assert found[0][0].abs().max() > 0.01
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, says", (
    ({"x": torch.ones(6)}, "x must be"),
    ({"x": torch.ones(2, 6, 4, dtype=torch.long)}, "x must be"),
    ({"x": torch.ones(2, 6, dtype=torch.complex64)}, "x must be"), ({"x": None}, "x must be"),
    ({"groups": 4}, "groups"), ({"groups": 0}, "groups"), ({"groups": 3.0}, "groups"),
    ({"groups": -3}, "groups"),
    ({"weight": torch.ones(5)}, "weight"), ({"weight": None}, "weight"),
    ({"bias": torch.ones(6, 1)}, "bias"), ({"bias": torch.ones(6, dtype=torch.long)}, "bias"),
    ({"weight": torch.ones(6, device="meta")}, "meta"),
    ({"scale": torch.ones(6)}, "scale"), ({"scale": torch.ones(1, 6)}, "scale"),
    ({"shift": torch.ones(2, 3)}, "shift"), ({"shift": 1.0}, "shift"),
    ({"eps": 0.0}, "eps"), ({"eps": float("nan")}, "eps"), ({"eps": float("inf")}, "eps"),
), ids=str)
def test_wrong_arguments(change, says):
    given = dict(x=torch.ones(2, 6, 4), groups=3, weight=torch.ones(6), bias=torch.ones(6)) | change
    with pytest.raises(ValueError, match=says) as error:
        group_norm(**given)
    assert "\n" not in str(error.value)


@pytest.mark.program("group_norm")
def test_kernels_in_the_interpreter(program):
    assert "cases right" in program


@GPU
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("shape, groups", (
    ((64, 128, 32, 32), 32), ((16, 64, 128, 128), 16), ((8, 256, 16, 16), 8),
    ((64, 512, 8, 8), 32), ((64, 256, 16, 16), 32), ((2, 32, 32, 32), 2), ((2, 64, 31, 33), 4),
    ((300, 8, 4, 4), 2)), ids=str)
def test_gpu_every_kernel(shape, groups, layout):
    """Tiles of several groups, split groups, steps, more samples than the parameters' kernel takes
    at once: right, the same bits in every run, in one graph, and replayed."""
    for dtype in (torch.float32, torch.bfloat16):
        case = (*inputs(shape, dtype, layout=layout, device="cuda"), groups)
        ours = gradients(group_norm, *case)
        assert_no_worse(ours, gradients(eager, *case),
                        gradients(closed_form, *case, dtype=torch.float64), dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients(group_norm, *case)))
    torch.testing.assert_close(gradients(torch.compile(group_norm, fullgraph=True), *case), ours,
                               rtol=0, atol=0)
    x, *rest = case[:5]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm(x, groups, *rest)
    x.mul_(3).add_(1)
    graph.replay()
    assert torch.equal(y, group_norm(x, groups, *rest))
