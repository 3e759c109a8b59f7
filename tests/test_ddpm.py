"""ddpm.py's mathematics, without training.

Data whose best denoiser is known in closed form, and float64 written another way.
"""
import math

import pytest
import torch
from torch.testing import assert_close

import conftest
import ddpm
from common import draws
from common.data import Dataset
from common.schedules import alpha_bar, posterior, timesteps
from kernels.noise import randn

M, V = 0.3, 0.04  # the data: N(M, V) in each value


def settings(**changes):
    old = dict(T=100, schedule="linear", predict="eps", variance="beta-tilde")
    return conftest.settings(ddpm, **old | changes)


def exact(c, x, t, kind=None):
    """What the best network says of x (float64 or float32) at step t.

    From E[x0 | x_t] of Gaussian data.
    """
    ab = alpha_bar(c.schedule, c.T).to(x.dtype)
    each = [-1] + [1] * (x.ndim - 1)
    signal, noise = ab[t].sqrt().view(each), (1 - ab[t]).sqrt().view(each)
    x0 = M + signal * V / (signal * signal * V + noise * noise) * (x - signal * M)
    eps = (x - signal * x0) / noise
    c_x, c_0, _, _ = posterior(ab[t], ab[t - 1])
    answers = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0,
               "mean": c_x.view(each) * x + c_0.view(each) * x0}
    return answers[kind or c.predict]


def network(c, nu=0.0):
    """The best network as a module: call(x, t in [0, 1], label).

    Computed in float64, as the mean needs. nu: what it says of a learned variance.
    """
    def net(x, t, label=None):
        out = exact(c, x.double(), (t.double() * c.T).round().long())
        if getattr(c, "variance", "") == "learned":
            out = torch.cat([out, torch.full_like(out, nu)], 1)
        return out.float()
    return net


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("steps", [100, 30])
def test_moments_of_samples(predict, steps):
    """With the best network every step is linear and Gaussian.

    The samples' mean and variance follow a recursion in float64.
    """
    c = settings(predict=predict, shape=(2,))
    x = ddpm.sample(c, network(c), 0, 20_000, steps)
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps)
    mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for t, s in zip(tau.flip(0), torch.cat([torch.zeros(1, dtype=torch.long), tau]).flip(0)[1:]):
        c_x, c_0, _, beta_tilde = posterior(ab[t], ab[s])
        # E[x0 | x] = M + gain (x - sqrt(ab) M)
        gain = ab[t].sqrt() * V / (ab[t] * V + 1 - ab[t])
        mean = c_x * mean + c_0 * (M + gain * (mean - ab[t].sqrt() * M))
        var = (c_x + c_0 * gain) ** 2 * var + beta_tilde
    n = x.numel()
    assert abs(x.double().mean() - mean) < 4 * (var / n).sqrt()
    assert abs(x.double().var() / var - 1) < 4 * (2 / n) ** 0.5
    # the data's; the variance falls short of V, as the smaller of Ho 2020's two choices does for
    # wide data
    assert abs(mean - M) < 0.02


@pytest.mark.parametrize("variance", ["beta", "beta-tilde", "learned"])
def test_one_step_against_float64(variance):
    """Algorithm 2 written out again, with the kernel's noise."""
    nu = -0.5
    steps, n, shape = 9, 4, (1, 3, 3)
    c = settings(variance=variance, T=50, shape=shape)
    x = randn((n, *shape), c.seed, 0, stream=draws.START).double()
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps).tolist()
    for i in range(steps - 1, -1, -1):
        t, s = tau[i], tau[i - 1] if i else 0
        beta = 1 - ab[t] / ab[s]
        tilde = beta * (1 - ab[s]) / (1 - ab[t])
        eps = exact(c, x, torch.full((n,), t))
        x0 = ((x - (1 - ab[t]).sqrt() * eps) / ab[t].sqrt()).clamp(-1, 1)
        mean = ab[s].sqrt() * beta / (1 - ab[t]) * x0
        mean = mean + (ab[t] / ab[s]).sqrt() * (1 - ab[s]) / (1 - ab[t]) * x
        if i:
            w = (nu + 1) / 2
            learned = beta ** w * tilde ** (1 - w)
            var = {"beta": beta, "beta-tilde": tilde, "learned": learned}[variance]
            fresh = randn((n, *shape), c.seed, 0, t, draws.STEP).double()
            mean = mean + var.sqrt() * fresh
        x = mean
    got = ddpm.sample(c, network(c, nu), 0, n, steps)
    assert_close(got.double(), x, atol=2e-5, rtol=1e-4)


def speaks_of_labels(x, t, label):
    """A network whose output is moved by the label and by the time, for guidance."""
    return x * 0.1 + (label.float() - 1).view(-1, 1) * 0.05 + t.view(-1, 1) * 0.03


def test_guidance_is_linear_in_its_weight():
    label = torch.tensor([0, 1, 1])
    one = {}
    for w in (0.0, 1.0, 3.0):
        c = settings(labels=2, conditional=True, T=20, shape=(2,), guidance=w)
        one[w] = ddpm.sample(c, speaks_of_labels, 0, 3, 1, label)
    assert_close(one[3.0], one[0.0] + 3 * (one[1.0] - one[0.0]), atol=1e-4, rtol=1e-4)
    assert (one[3.0] - one[1.0]).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_leaves_a_learned_variance_alone(guidance):
    def net(x, t, label):
        out = speaks_of_labels(x, t, label)
        return torch.cat([out, torch.ones_like(out)], 1)  # that variance which beta is

    label = torch.tensor([0, 1, 1])
    given = dict(labels=2, conditional=True, T=20, shape=(2,), guidance=guidance)
    wanted = ddpm.sample(settings(variance="beta", **given), speaks_of_labels, 0, 3, 5, label)
    got = ddpm.sample(settings(variance="learned", **given), net, 0, 3, 5, label)
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["beta", "beta-tilde", "learned"])
def test_bound_against_distributions(variance):
    """The KL of torch.distributions, and a level's mass by the Gaussian's distribution function.

    Both in float64.
    """
    c = settings(variance=variance)
    table = ddpm.walk(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 1, 2, 3, 50, 100])
    x0 = torch.randint(0, 256, (6, 1, 4, 4), generator=g) / 127.5 - 1
    x0[0, 0, 0] = torch.tensor([-1, -1, 1, 1.])
    ab, shape = alpha_bar(c.schedule, c.T), (-1, 1, 1, 1)
    signal, noise = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    x_t = (signal * x0 + noise * torch.randn(x0.shape, generator=g)).float()
    out = torch.randn(6, 2 if variance == "learned" else 1, 4, 4, generator=g)
    got = ddpm.bound(c, out, x0.float(), x_t, t, table).double()

    s = t - 1
    c_x, c_0, beta, tilde = (row.view(shape) for row in posterior(ab[t], ab[s]))
    tilde_1 = posterior(ab[2], ab[1])[3]
    # what stands for the variance 0 of the last step
    variance_q = torch.where(t.view(shape) == 1, tilde_1, tilde)
    x0_ = ((x_t.double() - noise * out[:, :1].double()) / signal).clamp(-1, 1)
    mean_p = c_x * x_t + c_0 * x0_
    w = (out[:, 1:].double() + 1) / 2
    learned = beta ** w * variance_q ** (1 - w) if variance == "learned" else 0
    var_p = {"beta": beta, "beta-tilde": variance_q, "learned": learned}[variance]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(c_x * x_t + c_0 * x0, variance_q.sqrt()),
        normal(mean_p, var_p.sqrt().expand_as(mean_p)))

    def below(y):
        return 0.5 * torch.special.erfc(-(y - mean_p) / var_p.sqrt() / math.sqrt(2))
    high = torch.where(x0 > 0.999, 1.0, below(x0 + 1 / 255))
    low = torch.where(x0 < -0.999, 0.0, below(x0 - 1 / 255))
    nll = -(high - low).clamp(min=1e-300).log()
    wanted = torch.where(t.view(shape) == 1, nll, kl).flatten(1).mean(1) / math.log(2)
    # elsewhere the reference itself has run out of digits
    sure = (nll.flatten(1).amax(1) < 600) | (t > 1)
    assert sure.sum() >= 5
    assert_close(got[sure], wanted[sure], atol=1e-4, rtol=1e-3)


def test_discretised_gaussian_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.3), (-0.99, 0.01), (1.0, 0.002), (0.0, 5.0), (0.37, 0.004)):
        mean, log_std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std).double().log()
        mass = ddpm.discretised_gaussian(levels, mean, log_std).exp()
        assert_close(mass.sum(), torch.ones((), dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_bits_per_dim_is_unbiased(off):
    """The stratified estimate against the whole sum over t, for the best network of the data.

    And for one that is off, with which the terms between t = 1 and T weigh more.
    """
    c = settings(T=12, variance="beta", shape=(1, 4, 4))
    best = network(c)

    def net(x, t, label=None):
        return best(x, t, label) + off
    g = torch.Generator().manual_seed(1)
    images = (M + V ** 0.5 * torch.randn(64, 1, 4, 4, generator=g)).clamp(-1, 1)
    images = images.add(1).mul(127.5).round().to(torch.uint8)
    data = Dataset("x", images, None, torch.zeros(64, dtype=torch.long), [], (1, 4, 4))
    got, error = ddpm.bits_per_dim(c, net, data, parts=64)

    x0 = data.batch(torch.arange(64))[0]
    table, ab = ddpm.walk(c, torch.arange(1, 13)), alpha_bar(c.schedule, 12)
    normal = torch.distributions.Normal
    prior = torch.distributions.kl_divergence(
        normal(ab[12].sqrt() * x0.double(), (1 - ab[12]).sqrt()),
        normal(torch.zeros(()).double(), 1.0))
    total = prior.mean() / math.log(2)
    for t in range(1, 13):
        terms = []
        for _ in range(40):
            eps = torch.randn(x0.shape, generator=g)
            x_t = ab[t].sqrt() * x0 + (1 - ab[t]).sqrt() * eps
            steps = torch.full((64,), t)
            out = net(x_t, steps / 12)
            terms.append(ddpm.bound(c, out, x0, x_t.float(), steps, table).mean().double())
        total = total + torch.stack(terms).mean()
    assert abs(got - total.item()) < 0.01 * total.item()
    assert 0 < error < 0.1 * got


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
def test_the_loss_of_a_perfect_answer_is_zero(predict):
    c = settings(predict=predict, variance="beta")
    table = ddpm.walk(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 2, 50, 99, 100])
    x0, eps = (torch.randn(5, 1, 2, 2, generator=g) for _ in range(2))
    ab, shape = alpha_bar(c.schedule, c.T).float(), (-1, 1, 1, 1)
    signal, noise = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    c_x, c_0 = table[t - 1, 2].view(shape), table[t - 1, 3].view(shape)
    x_t = signal * x0 + noise * eps
    right = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0,
             "mean": c_x * x_t + c_0 * x0}[predict]
    assert ddpm.objective(c, right, x0, x_t, eps, t, signal, noise, table) < 1e-10
    assert ddpm.objective(c, right + 0.1, x0, x_t, eps, t, signal, noise, table) > 1e-3


def test_hybrid_loss_teaches_the_mean_by_the_simple_loss_alone():
    c, simple = settings(variance="learned"), settings(variance="beta")
    table = ddpm.walk(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 30, 100])
    x0 = torch.rand(3, 1, 4, 4, generator=g) * 2 - 1
    eps = torch.randn(3, 1, 4, 4, generator=g)
    ab, shape = alpha_bar(c.schedule, c.T).float(), (-1, 1, 1, 1)
    signal, noise = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    x_t = signal * x0 + noise * eps
    out = torch.randn(3, 2, 4, 4, generator=g).requires_grad_()
    of_hybrid = ddpm.objective(c, out, x0, x_t, eps, t, signal, noise, table)
    of_simple = ddpm.objective(simple, out[:, :1], x0, x_t, eps, t, signal, noise, table)
    hybrid, = torch.autograd.grad(of_hybrid, out)
    plain, = torch.autograd.grad(of_simple, out)
    assert_close(hybrid[:, :1], plain[:, :1])
    assert hybrid[:, 1:].abs().max() > 1e-8 and plain[:, 1:].abs().max() == 0


@pytest.mark.parametrize("T,batch", [(20, 64), (1000, 64), (1000, 7), (2, 3)])
def test_training_visits_every_t(T, batch):
    """1..T, both ends among them, each as often as any other; in float32 too, as training does."""
    c = settings(T=T, batch=batch)
    n = 40 * T // batch + 400
    u = torch.cat([draws.spread(c, step) for step in range(1, n)])
    for t in ((u * T).long() + 1, (u.float() * T).long() + 1):
        counts = t.bincount(minlength=T + 1)
        assert t.min() == 1 and t.max() == T
        expected = len(t) / T
        assert ((counts[1:] - expected).abs() < 6 * expected ** 0.5 + 1).all()


@pytest.mark.parametrize("alike", [1, 4])
@pytest.mark.parametrize("batch", [8, 64, 200])
def test_spread_lies_once_in_each_equal_part(batch, alike):
    c = settings(batch=batch)
    many = batch // alike
    parts = torch.arange(many).repeat_interleave(alike)
    drawn = []
    for step in range(1, 50):
        u = draws.spread(c, step, alike)
        assert u.shape == (batch,) and u.dtype == torch.float64
        assert 0 <= u.min() and u.max() < 1 and u.float().max() < 1
        assert ((u * many).long() == parts).all()
        assert_close(u.diff()[alike - 1::alike], torch.full((many - 1,), 1 / many).double())
        drawn.append(u)
    assert len({u[0].item() for u in drawn}) == 49  # each update has a shift of its own


@pytest.mark.parametrize("k,n", [(1, 5), (16, 1000), (64, 7)])
def test_strata_lie_once_in_each_equal_part(k, n):
    u = draws.strata(k, n, torch.Generator().manual_seed(0))
    assert u.shape == (k, n) and u.dtype == torch.float64
    assert 0 <= u.min() and u.max() < 1 and u.float().max() < 1
    assert ((u * k).long() == torch.arange(k)[:, None]).all()
    assert len(u.unique()) > 0.99 * k * n  # each is drawn by itself


def test_spread_and_strata_stay_below_1_whatever_is_drawn(monkeypatch):
    """As float32 (15 + u) / 16 rounds to 1 where u is the largest number below 1."""
    def largest(size, generator=None, dtype=torch.float32):
        return torch.full(size, 1 - 2 ** -24, dtype=dtype)
    monkeypatch.setattr(torch, "rand", largest)
    for many in (1, 2, 16, 64, 1000):
        for u in (draws.spread(settings(batch=many), 1), draws.strata(many, 1, None)[:, 0]):
            assert ((u * many).long() == torch.arange(many)).all()
            assert u.float().max() < 1
            for T in (1, 2, 4, 12, 999, 1000, 4000):
                assert (u * T).long().max() == T - 1
                assert (u.float() * T).long().max() == T - 1
