"""vdm.py's mathematics, without training: closed forms of Gaussian data and of 256 levels.

Whatever is an expectation over the noise is summed by quadrature; what a sampler does to Gaussian
data is known step by step. Reference values were computed apart from this code.
"""
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import conftest
import vdm
from common import draws
from common.data import Dataset
from common.schedules import posterior
from kernels.noise import randn

# m, c^2 of Gaussian data: its diffusion term, latent KL and the sum with the reconstruction, nats;
# then the diffusion term in T = 10, 100, 1000 steps of a linear gamma
GAUSSIAN = {(0.0, 1.0): (6.646643, 0.003358, 1.418939, 17.707852, 7.243793, 6.703246),
            (0.3, 0.25): (5.956015, 0.001149, 0.726102, 15.727564, 6.485690, 6.006237),
            (-0.5, 0.04): (5.040448, 0.000982, -0.189631, 13.107750, 5.480930, 5.082235)}
DECODER = -5.231061  # nats: the reconstruction of a point


def settings(**changes):
    old = dict(gamma="linear", weight="bound", predict="eps", shape=(1, 1, 1))
    return conftest.settings(vdm, **old | changes)


def untidy(c):
    """A learned gamma in float64, far from where it starts."""
    gamma = vdm.Gamma(c).double()
    with torch.no_grad():
        for i, p in enumerate(p for name, p in gamma.named_parameters() if name != "ends"):
            p += 0.5 * randn((1, *p.shape), 1, step=i)[0].double()
    return gamma


def legendre(n):
    """Nodes and weights of Gauss and Legendre on [0, 1], float64 (n,)."""
    import numpy as np
    node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(n))
    return (node + 1) / 2, weight / 2


def normal(n=161):
    """Normals from -8 to 8 and the weights of a sum that stands for a mean, float64 (n,)."""
    eps = torch.linspace(-8, 8, n, dtype=torch.float64)
    weight = (-eps ** 2 / 2).exp()
    return eps, weight / weight.sum()


def f(gamma, variance):
    """E (eps - eps')^2 of Gaussian data by its best denoiser."""
    snr = torch.exp(-gamma)
    return variance * snr / (1 + variance * snr)


class Best(nn.Module):
    """The best denoiser of Gaussian data, N(m, variance) in each value, and a gamma."""

    def __init__(self, c, m, variance):
        super().__init__()
        self.c, self.m, self.variance, self.gamma = c, m, variance, vdm.Gamma(c)
        self.calls = 0

    def forward(self, z, time, label=None):
        self.calls += 1
        gamma = vdm.GAMMA_0 + (vdm.GAMMA_1 - vdm.GAMMA_0) * time.double()
        gamma = gamma.view(-1, *[1] * (z.ndim - 1))
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        gain = self.variance * alpha / (sigma ** 2 + self.variance * alpha ** 2)
        x = self.m + gain * (z.double() - alpha * self.m)
        eps = (z.double() - alpha * x) / sigma
        out = eps if self.c.predict == "eps" else alpha * eps - sigma * x
        return out.to(z.dtype)


# -------------------------------------------------------------------------------------------- gamma
@pytest.mark.parametrize("kind", ["linear", "cosine", "learned"])
@pytest.mark.parametrize("weight", ["bound", "sigmoid"])
@pytest.mark.parametrize("double", [True, False])
def test_gamma_holds_its_ends_and_rises(kind, weight, double):
    c = settings(gamma=kind, weight=weight)
    for gamma in (vdm.Gamma(c), untidy(c)) if kind == "learned" else (vdm.Gamma(c),):
        gamma = gamma.double() if double else gamma.float()
        t = torch.linspace(0, 1, 1001, dtype=torch.float64 if double else torch.float32)
        with torch.no_grad():
            values = gamma(t)
        assert values[0] == gamma.ends[0] and values[-1] == gamma.ends[1]  # to the bit
        assert gamma.ends.tolist() == pytest.approx([-13.3, 5.0])
        assert (values.diff() > 0).all()


@pytest.mark.parametrize("weight", ["bound", "sigmoid"])
def test_a_learned_gamma_starts_where_it_says(weight):
    """Near the line for the bound, near the cosine for the eye."""
    t = torch.linspace(0, 1, 101)
    start = dict(bound="linear", sigmoid="cosine")[weight]
    learned = vdm.Gamma(settings(gamma="learned", weight=weight))
    known = vdm.Gamma(settings(gamma=start))
    with torch.no_grad():
        assert 0 < (learned.rise(t)[0] - known.rise(t)[0]).abs().max() < 0.1
    assert sum(p.numel() for p in learned.parameters()) == 3 * 1024 + 2


def test_the_cosine_is_even_in_the_angle():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    gamma = vdm.Gamma(settings(gamma="cosine")).double()(t)
    angle = torch.atan2(torch.sigmoid(gamma).sqrt(), torch.sigmoid(-gamma).sqrt())
    assert_close(angle.diff(), angle.diff().mean().expand(10))
    assert_close(angle / (math.pi / 2), torch.lerp(torch.tensor(0.000823800).double(),
                                                   torch.tensor(0.947859963).double(), t),
                 atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "learned"])
def test_the_derivative_of_the_shape_is_its_derivative(kind):
    c = settings(gamma=kind)
    gamma = untidy(c) if kind == "learned" else vdm.Gamma(c).double()
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    u, du = gamma.rise(t)
    assert_close(torch.autograd.grad(u.sum(), t)[0], du.detach(), atol=0, rtol=1e-10)


# -------------------------------------------------------------------------------- the terms, summed
@pytest.mark.parametrize("shape", ["linear", "cosine", "learned"])
@pytest.mark.parametrize("data", GAUSSIAN)
def test_continuous_time_has_one_loss_for_every_shape(data, shape):
    """1/2 times the integral of gamma' f is ln[(1 + c^2 e^-g0) / (1 + c^2 e^-g1)] / 2."""
    c = settings(gamma=shape)
    gamma = untidy(c) if shape == "learned" else vdm.Gamma(c).double()
    total = 0
    for part in range(64):
        node, weight = legendre(32)
        with torch.no_grad():
            gamma_t, factor, _ = vdm.visited(c, gamma, (part + node) / 64)
        total += (weight * factor * f(gamma_t, data[1])).sum() / 64
    # the integrand of the cosine is a peak at t = 0
    assert total.item() == pytest.approx(GAUSSIAN[data][0], abs=2e-6)


@pytest.mark.parametrize("data", GAUSSIAN)
@pytest.mark.parametrize("T", [10, 100, 1000])
def test_the_loss_of_T_steps(data, T):
    c = settings(T=T)
    u = (torch.arange(T, dtype=torch.float64) + 0.3) / T
    gamma_t, factor, _ = vdm.visited(c, vdm.Gamma(c).double(), u)
    assert gamma_t[-1] == vdm.Gamma(c).ends[1]  # t = 1 is visited, t = 0 is not
    want = GAUSSIAN[data][3 + [10, 100, 1000].index(T)]
    assert (factor * f(gamma_t, data[1])).mean().item() == pytest.approx(want, rel=1e-6)


def test_T_steps_are_right_at_both_ends_of_u():
    c = settings(T=7)
    u = torch.tensor([0.0, draws.BELOW_1])
    gamma_t, factor, _ = vdm.visited(c, vdm.Gamma(c), u)
    assert_close(gamma_t, torch.tensor([-13.3 + 18.3 / 7, 5.0]))
    assert_close(factor, torch.full((2,), 3.5 * math.expm1(18.3 / 7)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", GAUSSIAN)
def test_the_latent_kl_and_the_decoder_of_points(data):
    m, variance = data
    diffusion, latent, total, *_ = GAUSSIAN[data]
    eps, weight = normal()
    x = (m + variance ** 0.5 * eps)[:, None]
    kl = (weight * vdm.latent_kl(x, torch.tensor(5.0).double())).sum().item()
    assert kl == pytest.approx(latent, abs=1e-6)
    recon = vdm.reconstruction(x, torch.tensor(-13.3).double(), eps[:, None], 255)
    recon = (weight * recon).sum().item()
    assert recon == pytest.approx(DECODER, abs=1e-5)
    assert diffusion + kl + recon == pytest.approx(total, abs=2e-5)


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_the_error_of_the_best_denoiser_is_known(predict):
    c = settings(predict=predict, shape=(2,))
    net = Best(c, 0.3, 0.25)
    for gamma in (-12.0, -5.0, 0.0, 4.0):
        x0 = 0.3 + 0.5 * randn((50_000, 2), 1, step=3)
        off = vdm.error(c, net, x0, torch.full((50_000,), gamma), None, 0, 0, 1, draws.NOISE)
        want = f(torch.tensor(gamma), 0.25)
        assert abs(off.mean() - want) < 4 * want * (2 / 100_000) ** 0.5, gamma


# ------------------------------------------------------------------------------- 256 levels, summed
def spread_over(*shares):
    """256 shares, given as (level, share) and the rest evenly."""
    result = torch.zeros(256, dtype=torch.float64)
    for level, share in shares:
        result[level] = share
    return result + (1 - result.sum()) / 256


LEVELS = {  # diffusion, latent KL, reconstruction, and all, in bits
    "0 and 255": (spread_over((0, 0.5), (255, 0.5)), 0.995194, 0.004806, 0.005227, 1.005227),
    "127 and 128": (spread_over((127, 0.5), (128, 0.5)), 0.994773, 0.000016, 0.010453, 1.005243),
    "even": (spread_over(), 7.987969, 0.001625, 0.010412, 8.000007),
    "mostly black": (None, 3.068646, 0.004005, 0.006533, 3.079184)}
_rest = torch.full((256,), 0.25 / 254, dtype=torch.float64)
_rest[0], _rest[255] = 0.7, 0.05
LEVELS["mostly black"] = (_rest, *LEVELS["mostly black"][1:])


def mixture(shares):
    """The best denoiser of values on 256 levels with these shares, with the network's call."""
    there = shares > 0
    x = (2 * torch.arange(256, dtype=torch.float64)[there] + 1) / 256 - 1
    log_share = shares[there].log()

    def net(z, time, label=None):
        gamma = vdm.GAMMA_0 + (vdm.GAMMA_1 - vdm.GAMMA_0) * time.double()
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        flat = z.double().flatten(1)  # (B, values)
        far = flat[:, :, None] - alpha[:, None, None] * x
        near = (log_share - far ** 2 / (2 * sigma ** 2)[:, None, None]).softmax(2)
        eps = (flat - alpha[:, None] * (near * x).sum(2)) / sigma[:, None]
        return eps.view(z.shape).to(z.dtype)
    return net


@pytest.mark.parametrize("data", LEVELS)
def test_the_terms_of_256_levels(data, monkeypatch):
    """By sums over levels, noise and gamma, against values that were computed apart."""
    shares, diffusion, latent, recon, total = LEVELS[data]
    c, there = settings(), shares > 0
    many = int(there.sum())
    eps, weight = normal(61 if many > 2 else 161)
    level = torch.arange(256, dtype=torch.float64)[there]
    x0 = (level / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 1, len(eps))  # (levels, 1, 1, normals)

    kl = vdm.latent_kl(vdm.onto_levels(x0) * x0, torch.tensor(5.0).double())
    bits = [(shares[there] * kl).sum() / math.log(2)]
    each = eps.expand_as(x0)
    g0 = torch.tensor(-13.3).double()
    # a value is a sample of its own, so that each has its weight
    alone = vdm.reconstruction(x0.reshape(-1, 1, 1, 1), g0, each.reshape(-1, 1, 1, 1),
                               vdm.reach_of(-13.3)).view(many, -1)
    bits.append((shares[there] @ (alone @ weight)) / math.log(2))

    def noised(x0, a, s, *numbers):
        a, s = (v.double().view(-1, 1, 1, 1) for v in (a, s))
        return a * x0 + s * each, each

    monkeypatch.setattr(vdm, "add_noise", noised)
    net, gamma, parts = mixture(shares), vdm.Gamma(c).double(), 40 if many > 2 else 200
    node, t_weight = legendre(parts)
    term = 0
    for u, w in zip(node, t_weight):
        gamma_t, factor, _ = vdm.visited(c, gamma, u.expand(many))
        z, _ = noised(x0, torch.sigmoid(-gamma_t).sqrt() * 255 / 256,
                      torch.sigmoid(gamma_t).sqrt())
        off = (eps - net(z, vdm.time_of(gamma_t))).square()[:, 0, 0] @ weight
        term += w * factor[0] * (shares[there] @ off)
    bits.append(term / math.log(2))
    # the code's own error, of evenly weighted noise, is that of these nodes
    mine = vdm.error(c, net, x0, gamma_t, None, 0, 0, 1, draws.NOISE)
    assert_close(mine, (eps - net(z, vdm.time_of(gamma_t))).square().flatten(1).mean(1).double(),
                 atol=1e-6, rtol=1e-5)
    assert [b.item() for b in bits] == pytest.approx([latent, recon, diffusion], abs=2e-5)
    assert sum(bits).item() == pytest.approx(total, abs=3e-5)


def test_the_reconstruction_is_that_of_all_256_levels():
    """Against softmax over all of them, in float64, for noise that reaches many levels too."""
    x0 = (torch.tensor([0, 1, 3, 100, 254, 255]) / 127.5 - 1).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    x, grid = x0.double() * 255 / 256, (2 * torch.arange(256).double() + 1) / 256 - 1
    eps = randn((6, 1, 8, 8), 3)
    for g0 in (-13.3, -11.0, -8.0, -4.0, 0.0):
        std = math.exp(g0 / 2)
        logits = -(x + std * eps.double() - grid.view(-1, 1, 1, 1, 1)) ** 2 / (2 * std ** 2)
        own = ((x0 + 1) * 127.5).round().long()
        want = -logits.log_softmax(0).gather(0, own[None])[0].flatten(1).mean(1)
        got = vdm.reconstruction(x0, torch.tensor(g0), eps, vdm.reach_of(g0))
        assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
    assert vdm.reach_of(-13.3) == 3 and vdm.reach_of(0.0) == vdm.reach_of(math.nan) == 255
    assert vdm.reach_of(math.inf) == 255 and vdm.reach_of(-math.inf) == 0


def test_the_grid_of_the_data():
    """On it the features that the network is fed are the same at all levels; on x0's own not."""
    x0 = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    x = x0 * vdm.onto_levels(x0.view(1, 1, 16, 16))
    assert_close(x, (2 * torch.arange(256, dtype=torch.float64) + 1) / 256 - 1)
    for power, sign in ((8, 1), (7, (-1) ** torch.arange(256))):
        phase = torch.exp(1j * 2 ** power * math.pi * x) * sign
        assert phase.mean().abs().item() == pytest.approx(1)
    assert torch.exp(1j * 2 ** 8 * math.pi * x0).mean().abs().item() == pytest.approx(0.003906,
                                                                                     abs=1e-5)
    assert vdm.onto_levels(torch.zeros(5, 2)) == 1


def test_levels_decoded_wrongly():
    eps = randn((40, 1, 32, 32), 5)
    for level, g0, want in ((100, -13.3, 0.00253871), (0, -13.3, 0.00126936),
                            (255, -12.0, 0.0575), (7, -12.0, 0.115)):
        x0 = torch.full_like(eps, level / 127.5 - 1)
        wrong = (vdm.decoded(x0, torch.tensor(g0), eps) != level).double().mean().item()
        assert abs(wrong - want) < 4 * (want / eps.numel()) ** 0.5 + 5e-4 * (g0 > -13)


# ------------------------------------------------------------------------------------ the estimator
def levels_data(shares, n=64, side=8):
    generator = torch.Generator().manual_seed(0)
    level = torch.multinomial(shares, n * side * side, True, generator=generator)
    images = level.to(torch.uint8).view(n, 1, side, side)
    return Dataset("levels", images, None, torch.full((n,), -1), [], (1, side, side))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_bits_per_dim_of_pictures(kind):
    """With the best denoiser the estimate is the bound, whatever gamma the model has."""
    shares, diffusion, latent, recon, total = LEVELS["0 and 255"]
    c = settings(gamma=kind, shape=(1, 8, 8))
    net = vdm.Model(nn.Identity(), vdm.Gamma(c))
    net.forward = mixture(shares)
    result, bits = vdm.bits_per_dim(c, net, levels_data(shares, 200))
    assert bits.shape == (200, 3) and result["bits/dim +-"] < 0.02
    assert abs(result["bits/dim"] - total) < 4 * result["bits/dim +-"]
    assert result["latent KL"] == pytest.approx(latent, abs=1e-5)
    assert result["reconstruction"] == pytest.approx(recon, rel=0.3)
    assert result["by its formula"] == pytest.approx(0.00126936, rel=1e-4)
    assert result["decoded wrongly"] == pytest.approx(0.00126936, rel=0.3)


@pytest.mark.parametrize("kind,T,want", [("linear", 10, 2.844007), ("linear", 100, 1.092539),
                                         ("cosine", 10, None)])
def test_bits_per_dim_in_T_steps(kind, T, want):
    """Of one model of continuous time, as the paper's table does; the steps are its own gamma's."""
    m, variance = 0.3, 0.25
    shares = LEVELS["0 and 255"][0]
    c = settings(gamma=kind, shape=(1, 8, 8) if want else (2,))
    if want:
        net, data = vdm.Model(nn.Identity(), vdm.Gamma(c)), levels_data(shares, 200)
        net.forward = mixture(shares)
    else:
        net, points = Best(c, m, variance), m + variance ** 0.5 * randn((500, 2), 9)
        data = Dataset("points", None, points, torch.full((500,), -1), [], (2,))
        gamma = vdm.Gamma(c).double()(torch.linspace(0, 1, T + 1, dtype=torch.float64))
        terms = torch.expm1(gamma.diff()) * f(gamma[1:], variance)
        want = terms.sum().item() / 2 / math.log(2)
    result, bits = vdm.bits_per_dim(c, net, data, T)
    error = bits[:, 2].std().item() / len(bits) ** 0.5
    assert abs(result["diffusion"] - want) < 4 * error < want / 4 and c.T == 0


def test_bits_per_dim_between_learned_ends_and_never_in_bf16():
    """The bound of Gaussian data from end to end, wherever the ends are, of fp32 guesses."""
    variance, low, high = 0.25, -11.0, 3.0
    c = settings(gamma="learned", ends="learned", shape=(2,), precision="bf16")

    class Watched(Best):
        def forward(self, x, time, label=None):
            assert not torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
            return super().forward(x, time, label)

    net = Watched(c, 0.3, variance)
    with torch.no_grad():
        net.gamma.ends.copy_(torch.tensor([low, high]))
    points = 0.3 + variance ** 0.5 * randn((500, 2), 9)
    data = Dataset("points", None, points, torch.full((500,), -1), [], (2,))
    result, bits = vdm.bits_per_dim(c, net, data)
    want = math.log((1 + variance * math.exp(-low)) / (1 + variance * math.exp(-high))) / 2
    error = bits[:, 2].std().item() / len(bits) ** 0.5
    assert abs(result["diffusion"] - want / math.log(2)) < 4 * error < 0.5


def test_bits_per_dim_of_points():
    m, variance = 0.3, 0.25
    c = settings(shape=(2,))
    points = m + variance ** 0.5 * randn((500, 2), 9)
    data = Dataset("points", None, points, torch.full((500,), -1), [], (2,))
    result, _ = vdm.bits_per_dim(c, Best(c, m, variance), data)
    want = GAUSSIAN[m, variance][2] / math.log(2)
    assert abs(result["bits/dim"] - want) < 4 * result["bits/dim +-"] < 0.6
    assert "decoded wrongly" not in result


# ---------------------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("T", [0, 10])
@pytest.mark.parametrize("weight", ["bound", "sigmoid"])
def test_one_backward_pass_has_three_gradients(T, weight):
    """Shape: of mean L^2, in T steps of mean L. Network: of mean L. Ends: of the bound. Float64."""
    ends = "learned" if weight == "bound" else "fixed"
    c = settings(gamma="learned", ends=ends, T=T, weight=weight)
    torch.manual_seed(0)
    inner = nn.Linear(1, 1).double()
    x0 = (randn((16, 1, 1, 1), 2).double() / 3 * 127.5).round() / 127.5
    gamma, t = untidy(c), draws.spread(c, 1)[:16]

    def net(x, time, label):
        return inner(x) * time.view(-1, 1, 1, 1)

    everything = [*inner.parameters(), *gamma.parameters()]
    loss, told = vdm.objective(c, net, gamma, x0, t, None, 3, 5, 255)
    got = torch.autograd.grad(loss, everything)

    # the same by hand, without hooks
    gamma_t, factor, _ = vdm.visited(c, gamma, t)
    signal, noise = torch.sigmoid(-gamma_t).sqrt(), torch.sigmoid(gamma_t).sqrt()
    eps = randn(x0.shape, c.seed, 3, 10, draws.NOISE).double()
    x = signal.view(-1, 1, 1, 1) * x0 * 255 / 256 + noise.view(-1, 1, 1, 1) * eps
    guess = net(x, (gamma_t + 13.3) / 18.3, None)
    L = factor * (eps - guess).square().flatten(1).mean(1)
    assert_close(told["diffusion"], L.mean() / math.log(2))
    L = L * torch.sigmoid(gamma_t + 2) if weight == "sigmoid" else L
    assert_close(told["square"], L.square().mean())
    of_mean = torch.autograd.grad(L.mean(), everything, retain_graph=True)
    of_square = torch.autograd.grad(L.square().mean(), everything, retain_graph=True)
    names = ["network"] * 2 + [name for name, _ in gamma.named_parameters()]
    for name, mine, mean, square in zip(names, got, of_mean, of_square):
        if name == "ends":
            x1 = x0 * 255 / 256
            eps_0 = randn(x0.shape, c.seed, 3, 11, draws.NOISE).double()
            rest = vdm.latent_kl(x1, gamma.ends[1]).mean() + vdm.reconstruction(
                x0, gamma.ends[0], eps_0, 255).mean()
            assert_close(loss, L.mean() + rest)
            mean = mean + torch.autograd.grad(rest, gamma.ends, retain_graph=True)[0]
        shape = name not in ("network", "ends") and T == 0
        assert_close(mine, square if shape else mean, atol=1e-13, rtol=1e-6)
        assert (mean - square).abs().max() > 1e-8


def test_the_weight_is_that_of_kingma_and_gao():
    gamma = torch.tensor([-13.3, -2.0, 5.0])
    assert_close(vdm.weight(settings(weight="sigmoid"), gamma), torch.tensor([1.23729e-05, 0.5,
                                                                             0.999088949]))
    assert_close(vdm.weight(settings(weight="bound"), gamma), torch.ones(3))


def test_what_the_optimizer_gets():
    """Every parameter once; those of gamma at rates of their own and never decayed."""
    c = settings(gamma="learned", ends="learned", shape=(1, 8, 8), width=8)
    net = vdm.network(c)
    groups = vdm.groups(net)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, net.parameters())) and len(ids) == len(set(ids))
    assert [group.get("scale", 1) for group in groups] == [1, 0.5, 0.1]
    assert [group.get("weight_decay") for group in groups] == [None, 0, 0]
    assert groups[2]["params"][0] is net.gamma.ends and len(groups[1]["params"]) == 5


@pytest.mark.parametrize("variance,want", [(1.0, [-9.976634, -6.652068, -3.293589, -1.031035]),
                                           (0.25, [-10.321868, -7.341403, -4.313840, -2.217716])])
def test_the_learned_shape_nears_its_optimum(variance, want):
    """Gaussian data, best denoiser: gamma's density nears that of f, and mean L^2 its least."""
    c = settings(gamma="learned", batch=256, shape=(16,))
    net = Best(c, 0.0, variance)
    gamma = net.gamma
    optimizer = torch.optim.Adam(gamma.parameters(), 5e-3)
    least = GAUSSIAN[(0.0, 1.0)][0] if variance == 1 else GAUSSIAN[(0.3, 0.25)][0]

    def second():
        with torch.no_grad():
            gamma_t, factor, _ = vdm.visited(c, gamma, (torch.arange(4096) + 0.5) / 4096)
            return (factor * f(gamma_t, variance)).square().mean().item() / least ** 2

    assert second() == pytest.approx(1.273769 if variance == 1 else 1.407513, rel=0.02)
    for step in range(1, 401):
        x0 = variance ** 0.5 * randn((256, 16), 1, step=step)
        loss, _ = vdm.objective(c, net, gamma, x0, draws.spread(c, step).float(), None, 0, step,
                                255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        got = gamma(torch.tensor([0.25, 0.5, 0.75, 0.9])).tolist()
    assert second() < 1.02, second()
    assert got == pytest.approx(want, abs=0.3)


# ----------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("gamma_t,gamma_s,ancestral,flow", [
    (5, 0, (0.058238, 0.702342, 0.704721), (0.709485, 0.649064)),
    (0, -4, (0.025668, 0.972816, 0.132879), (0.189664, 0.856853)),
    (-9.64, -13.3, (0.025733, 0.974267, 0.001277), (0.160419, 0.839586))])
def test_coefficients(gamma_t, gamma_s, ancestral, flow):
    ends = torch.tensor([gamma_s, gamma_t], dtype=torch.float64)
    alpha, sigma = torch.sigmoid(-ends[1]).sqrt(), torch.sigmoid(ends[1]).sqrt()
    row = vdm.walk(settings(), ends)[0].double()
    assert_close(row[2:], torch.tensor(ancestral, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    assert_close(row[:2], torch.stack([1 / alpha, -sigma / alpha]), atol=1e-6, rtol=1e-5)
    c_x, c_0, _, beta_tilde = posterior(torch.sigmoid(-ends[1]), torch.sigmoid(-ends[0]))
    assert_close(row[2:], torch.stack([c_x, c_0, beta_tilde.sqrt()]), atol=1e-6, rtol=1e-5)
    row = vdm.walk(settings(flow=True, predict="v"), ends)[0].double()
    assert_close(row[2:], torch.tensor([*flow, 0], dtype=torch.float64), atol=1e-6, rtol=1e-5)
    assert_close(row[:2], torch.stack([alpha, -sigma]), atol=1e-6, rtol=1e-5)


# mean and variance / c^2 of z_0 / alpha_0, of Gaussian data N(.3, .25), started from N(0, 1)
MOMENTS = [("ancestral", "gamma", 1, 0.299496, 0.001697),
           ("ancestral", "gamma", 10, None, 0.458398),
           ("ancestral", "gamma", 50, None, 0.837440), ("ancestral", "gamma", 200, None, 0.955629),
           ("flow", "gamma", 10, 0.290210, 0.636416), ("flow", "gamma", 50, 0.288247, 0.917313),
           ("ancestral", "cosine", 10, None, 0.616563), ("ancestral", "cosine", 50, None, 0.880639),
           ("flow", "cosine", 10, 0.289360, 0.751847), ("flow", "cosine", 50, 0.288047, 0.948731)]


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("way,spacing,steps,mean,variance", MOMENTS)
def test_what_the_samplers_keep_of_a_gaussian(way, spacing, steps, mean, variance, predict):
    c = settings(flow=way == "flow", spacing=spacing, predict=predict, shape=(2,))
    net = Best(c, 0.3, 0.25)
    x = vdm.sample(c, net, 0, 20_000, steps).double()
    assert net.calls == steps
    n, true = x.numel(), 0.25 * variance
    if mean is not None:
        assert abs(x.mean() - mean) < 4 * (true / n) ** 0.5 + 1e-5
    assert abs(x.var() / true - 1) < 4 * (2 / n) ** 0.5


def test_more_steps_than_T_are_an_error():
    c = settings(shape=(2,), T=10)
    with pytest.raises(ValueError, match="choose from 1 to 10"):
        vdm.sample(c, Best(c, 0.3, 0.25), 0, 2, 11)


def test_every_number_of_steps_is_exactly_as_many_evaluations():
    for c, most in ((settings(shape=(2,)), 300), (settings(shape=(2,), T=10), 10),
                    (settings(shape=(2,), T=10, spacing="gamma", gamma="cosine"), 10)):
        for steps in {1, 2, 3, most // 2, most}:
            net = Best(c, 0.3, 0.25)
            vdm.sample(c, net, 0, 2, steps)
            assert net.calls == steps


@pytest.mark.parametrize("spacing", ["cosine", "gamma"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_model_of_T_steps_is_asked_at_its_own_gammas(spacing, kind):
    c = settings(T=20, spacing=spacing, gamma=kind)
    gamma = vdm.Gamma(c)
    known = gamma(torch.linspace(0, 1, 21)).double()
    for steps in range(1, 21):
        grid = vdm.grid(c, gamma, steps)
        assert len(grid) == steps + 1 and (grid.diff() > 0).all()
        assert torch.isin(grid, known).all() and grid[0] == known[0] and grid[-1] == known[-1]
    assert_close(vdm.grid(c, gamma, 20), known)


def test_a_picture_s_sample_is_on_the_levels_of_uint8():
    """z_0 / alpha_0 is x, and x0 has 256/255 of it."""
    c = settings(shape=(1, 4, 4), flow=True)
    x0 = (torch.arange(16) * 17 / 127.5 - 1).view(1, 1, 4, 4)

    class Knows(Best):
        def forward(self, z, time, label=None):
            gamma = vdm.GAMMA_0 + 18.3 * time.view(-1, 1, 1, 1).double()
            alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
            return ((z - alpha * x0 * 255 / 256) / sigma).float()

    x = vdm.sample(c, Knows(c, 0, 1), 0, 3, 20)
    assert (x - x0).abs().max() < 0.5 / 127.5


def test_clipping_is_in_the_pictures_range():
    c = settings(shape=(1, 4, 4))
    net = Best(c, 0.9, 0.25)
    frames = []
    x = vdm.sample(c, net, 0, 50, 10, frames=frames)
    assert len(frames) == 10 and all(frame.abs().max() <= 256 / 255 + 1e-6 for frame in frames)
    c.clip = False
    assert vdm.sample(c, net, 0, 50, 10).max() > 1.2 > 1.02 > x.max()


def test_sampling_does_not_depend_on_how_it_is_split():
    c = settings(shape=(1, 4, 4))
    net = Best(c, 0.3, 0.25)
    whole = vdm.sample(c, net, 0, 6, 10)
    parts = [vdm.sample(c, net, first, n, 10) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------ network
def test_the_paper_s_network():
    """One resolution, one attention, blocks + 1 after it; it starts as the identity."""
    c = settings(plain=True, width=16, blocks=3, shape=(3, 8, 8), labels=5)
    net = vdm.network(c)
    z, time = randn((2, 3, 8, 8), 1), torch.tensor([0.2, 0.9])
    assert torch.equal(net(z, time, torch.tensor([1, 5])), z)
    of = [type(m).__name__ for m in net.modules()]
    assert of.count("Attention") == 1 and of.count("Block") == 3 + 2 + 4
    assert not {"Resample", "Dropout"} & {*of}
    with torch.no_grad():
        for p in net.net.parameters():
            p += 0.02 * randn(p.shape, 3)
    out = net(z, time, torch.tensor([1, 5]))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.net.parameters())
    assert (out - net(z, time, torch.tensor([2, 5])))[0].abs().max() > 0
    with pytest.raises(ValueError, match="odd"):
        vdm.network(settings(plain=True, width=9, shape=(3, 8, 8)))


def test_time_is_on_a_scale_that_never_moves():
    assert_close(vdm.time_of(torch.tensor([-13.3, -4.15, 5.0])), torch.tensor([0.0, 0.5, 1.0]))
    c = settings(ends="learned", gamma="linear")
    net = Best(c, 0.3, 0.25)
    with torch.no_grad():
        net.gamma.ends.copy_(torch.tensor([-12.0, 4.0]))
    grid = vdm.grid(c, net.gamma, 4)
    assert grid[[0, -1]].tolist() == pytest.approx([-12, 4]) and len(grid) == 5
