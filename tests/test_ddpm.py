"""ddpm.py's mathematics, without training: data whose best denoiser is known in closed form, and float64 written another way."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddpm
from common import runs
from common.schedules import alpha_bar, posterior, timesteps

M, V = 0.3, 0.04  # the data: N(M, V) in each value


def settings(**more):
    c = dict(T=100, schedule="linear", predict="eps", variance="beta-tilde", conditional=False, guidance=1.0, labels=0, seed=0,
             device=torch.device("cpu"), precision="fp32", compile=False)
    return SimpleNamespace(**{**c, **more})


def exact(c, x, t, kind=None):
    """What the best network says of x (float64 or float32) at step t: from E[x0 | x_t] of Gaussian data."""
    ab = alpha_bar(c.schedule, c.T).to(x.dtype)
    each = [-1] + [1] * (x.ndim - 1)
    a, s = ab[t].sqrt().view(each), (1 - ab[t]).sqrt().view(each)
    x0 = M + a * V / (a * a * V + s * s) * (x - a * M)
    eps = (x - a * x0) / s
    c_x, c_0, _, _ = posterior(ab[t], ab[t - 1])
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mean": c_x.view(each) * x + c_0.view(each) * x0}[kind or c.predict]


def network(c, more=0.0):
    """The best network as a module: call(x, t on the scale of 1000, label). Computed in float64, as the mean needs."""
    def net(x, t, label=None):
        out = exact(c, x.double(), (t.double() * c.T / 1000).round().long())
        return torch.cat([out, torch.full_like(out, more)], 1).float() if c.variance == "learned" else out.float()
    return net


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
@pytest.mark.parametrize("steps", [100, 30])
def test_moments_of_samples(predict, steps):
    """With the best network every step is linear and Gaussian: the samples' mean and variance follow a recursion in float64."""
    c = settings(predict=predict)
    x = ddpm.sample(c, network(c), (2,), 0, 20_000, steps)
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps)
    mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for t, s in zip(tau.flip(0), torch.cat([torch.zeros(1, dtype=torch.long), tau]).flip(0)[1:]):
        c_x, c_0, _, beta_tilde = posterior(ab[t], ab[s])
        gain = ab[t].sqrt() * V / (ab[t] * V + 1 - ab[t])  # E[x0 | x] = M + gain (x - sqrt(ab) M)
        mean = c_x * mean + c_0 * (M + gain * (mean - ab[t].sqrt() * M))
        var = (c_x + c_0 * gain) ** 2 * var + beta_tilde
    n = x.numel()
    assert abs(x.double().mean() - mean) < 4 * (var / n).sqrt()
    assert abs(x.double().var() / var - 1) < 4 * (2 / n) ** 0.5
    assert abs(mean - M) < 0.02  # the data's; the variance falls short of V, as the smaller of Ho 2020's two choices does for wide data


@pytest.mark.parametrize("variance", ["beta", "beta-tilde", "learned"])
def test_one_step_against_float64(variance):
    """Algorithm 2 written out again, with the kernel's noise."""
    from kernels.noise import randn
    c = settings(variance=variance, T=50)
    v = -0.5
    steps, n, shape = 9, 4, (1, 3, 3)
    x = randn((n, *shape), c.seed, 0, stream=runs.START).double()
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps).tolist()
    for i in range(steps - 1, -1, -1):
        t, s = tau[i], tau[i - 1] if i else 0
        beta = 1 - ab[t] / ab[s]
        tilde = beta * (1 - ab[s]) / (1 - ab[t])
        x0 = ((x - (1 - ab[t]).sqrt() * exact(c, x, torch.full((n,), t))) / ab[t].sqrt()).clamp(-1, 1)
        mean = ab[s].sqrt() * beta / (1 - ab[t]) * x0 + (ab[t] / ab[s]).sqrt() * (1 - ab[s]) / (1 - ab[t]) * x
        if i:
            w = (v + 1) / 2
            var = {"beta": beta, "beta-tilde": tilde, "learned": beta ** w * tilde ** (1 - w)}[variance]
            mean = mean + var.sqrt() * randn((n, *shape), c.seed, 0, t, runs.STEP).double()
        x = mean
    assert_close(ddpm.sample(c, network(c, v), shape, 0, n, steps).double(), x, atol=2e-5, rtol=1e-4)


def test_guidance_is_linear_in_its_weight():
    c = settings(labels=2, conditional=True, T=20)

    def net(x, t, label):
        return (x * 0.1 + (label.float() - 1).view(-1, 1) * 0.05)
    label = torch.tensor([0, 1, 1])
    one = {w: ddpm.sample(settings(**{**vars(c), "guidance": w}), net, (2,), 0, 3, 1, label) for w in (0.0, 1.0, 3.0)}
    assert_close(one[3.0], one[0.0] + 3 * (one[1.0] - one[0.0]), atol=1e-4, rtol=1e-4)
    assert (one[3.0] - one[1.0]).abs().max() > 0.01


def each(tables, *names):
    return {n: tables[i].double() for i, n in enumerate(("c_x", "c_0", "beta", "beta_tilde", "p_x", "p_out")) if n in names}


@pytest.mark.parametrize("variance", ["beta", "beta-tilde", "learned"])
def test_bound_against_distributions(variance):
    """The KL of torch.distributions, and the Gaussian's mass on a level by its distribution function, in float64."""
    c = settings(variance=variance)
    tables = ddpm.step_tables(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 1, 2, 3, 50, 100])
    x0 = torch.randint(0, 256, (6, 1, 4, 4), generator=g) / 127.5 - 1
    x0[0, 0, 0] = torch.tensor([-1, -1, 1, 1.])
    ab, shape = alpha_bar(c.schedule, c.T), (-1, 1, 1, 1)
    x_t = (ab[t].sqrt().view(shape) * x0 + (1 - ab[t]).sqrt().view(shape) * torch.randn(x0.shape, generator=g)).float()
    out = torch.randn(6, 2 if variance == "learned" else 1, 4, 4, generator=g)
    got = ddpm.bound(c, x0.float(), x_t, out, t, tables).double()

    s = t - 1
    c_x, c_0, beta, tilde = (v.view(shape) for v in posterior(ab[t], ab[s]))
    tilde_1 = posterior(ab[2], ab[1])[3]
    variance_q = torch.where(t.view(shape) == 1, tilde_1, tilde)  # what stands for the variance 0 of the last step
    a, sd = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    mean_p = c_x * x_t + c_0 * ((x_t.double() - sd * out[:, :1].double()) / a).clamp(-1, 1)
    w = (out[:, 1:].double() + 1) / 2
    var_p = {"beta": beta, "beta-tilde": variance_q, "learned": beta ** w * variance_q ** (1 - w) if variance == "learned" else 0}[variance]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(c_x * x_t + c_0 * x0, variance_q.sqrt()), normal(mean_p, var_p.sqrt().expand_as(mean_p)))

    def below(y):
        return 0.5 * torch.special.erfc(-(y - mean_p) / var_p.sqrt() / math.sqrt(2))
    high = torch.where(x0 > 0.999, 1.0, below(x0 + 1 / 255))
    low = torch.where(x0 < -0.999, 0.0, below(x0 - 1 / 255))
    nll = -(high - low).clamp(min=1e-300).log()
    wanted = torch.where(t.view(shape) == 1, nll, kl).flatten(1).mean(1) / math.log(2)
    sure = (nll.flatten(1).amax(1) < 600) | (t > 1)  # elsewhere the reference itself has run out of digits
    assert sure.sum() >= 5
    assert_close(got[sure], wanted[sure], atol=1e-4, rtol=1e-3)


def test_discretised_gaussian_sums_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.3), (-0.99, 0.01), (1.0, 0.002), (0.0, 5.0), (0.37, 0.004)):
        mass = ddpm.discretised_gaussian(levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(std).double().log()).exp()
        assert_close(mass.sum(), torch.ones((), dtype=torch.float64), atol=1e-9, rtol=0)


def test_bits_per_dim_is_unbiased():
    """The stratified estimate against the whole sum over t, for the best network of Gaussian data."""
    from common.data import Dataset
    c = settings(T=12, variance="beta")
    g = torch.Generator().manual_seed(1)
    images = ((M + V ** 0.5 * torch.randn(64, 1, 4, 4, generator=g)).clamp(-1, 1).add(1).mul(127.5).round()).to(torch.uint8)
    data = Dataset("x", images, None, torch.zeros(64, dtype=torch.long), [], (1, 4, 4))
    got, error = ddpm.bits_per_dim(c, network(c), data, draws=64)

    x0 = data.batch(torch.arange(64))[0]
    tables, ab = ddpm.step_tables(c, torch.arange(1, 13)), alpha_bar(c.schedule, 12)
    prior = torch.distributions.kl_divergence(torch.distributions.Normal(ab[12].sqrt() * x0.double(), (1 - ab[12]).sqrt()),
                                              torch.distributions.Normal(torch.zeros(()).double(), 1.0)).mean() / math.log(2)
    total = prior
    for t in range(1, 13):
        draws = []
        for _ in range(40):
            x_t = ab[t].sqrt() * x0 + (1 - ab[t]).sqrt() * torch.randn(x0.shape, generator=g)
            steps = torch.full((64,), t)
            draws.append(ddpm.bound(c, x0, x_t.float(), network(c)(x_t, steps * 1000 / 12), steps, tables).mean().double())
        total = total + torch.stack(draws).mean()
    assert abs(got - total.item()) < 0.05 * total.item() and 0 < error < 0.1 * got


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "mean"])
def test_the_loss_of_a_perfect_answer_is_zero(predict):
    c = settings(predict=predict, variance="beta")
    tables = ddpm.step_tables(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 2, 50, 99, 100])
    x0, eps = (torch.randn(5, 1, 2, 2, generator=g) for _ in range(2))
    ab, shape = alpha_bar(c.schedule, c.T).float(), (-1, 1, 1, 1)
    a, s = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    c_x, c_0 = tables[0][t].view(shape), tables[1][t].view(shape)
    x_t = a * x0 + s * eps
    right = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mean": c_x * x_t + c_0 * x0}[predict]
    assert ddpm.loss(c, right, x0, x_t, eps, a, s, t, tables) < 1e-10
    assert ddpm.loss(c, right + 0.1, x0, x_t, eps, a, s, t, tables) > 1e-3


def test_hybrid_loss_teaches_the_mean_by_the_simple_loss_alone():
    c, simple = settings(variance="learned"), settings(variance="beta")
    tables = ddpm.step_tables(c, torch.arange(1, c.T + 1))
    g = torch.Generator().manual_seed(0)
    t = torch.tensor([1, 30, 100])
    x0, eps = torch.rand(3, 1, 4, 4, generator=g) * 2 - 1, torch.randn(3, 1, 4, 4, generator=g)
    ab, shape = alpha_bar(c.schedule, c.T).float(), (-1, 1, 1, 1)
    a, s = ab[t].sqrt().view(shape), (1 - ab[t]).sqrt().view(shape)
    x_t = a * x0 + s * eps
    out = torch.randn(3, 2, 4, 4, generator=g).requires_grad_()
    hybrid, = torch.autograd.grad(ddpm.loss(c, out, x0, x_t, eps, a, s, t, tables), out)
    plain, = torch.autograd.grad(ddpm.loss(simple, out[:, :1], x0, x_t, eps, a, s, t, tables), out)
    assert_close(hybrid[:, :1], plain[:, :1])
    assert hybrid[:, 1:].abs().max() > 1e-8 and plain[:, 1:].abs().max() == 0


@pytest.mark.parametrize("T,batch", [(20, 64), (1000, 64), (1000, 7), (2, 3)])
def test_training_visits_every_t(T, batch):
    """1..T, both ends among them, each as often as any other."""
    c = SimpleNamespace(seed=0, batch=batch)
    n = 40 * T // batch + 400
    t = torch.cat([(runs.spread(c, step) * T).long() + 1 for step in range(1, n)])
    counts = t.bincount(minlength=T + 1)
    assert t.min() == 1 and t.max() == T
    expected = len(t) / T
    assert ((counts[1:] - expected).abs() < 6 * expected ** 0.5 + 1).all()
