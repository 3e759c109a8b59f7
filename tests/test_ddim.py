"""ddim.py's mathematics, without training.

A network known in closed form, and the paper's equations written out in float64.
"""
import pytest
import torch
from torch.testing import assert_close

import conftest
import ddim
from common import draws
from common.schedules import alpha_bar, posterior, timesteps
from kernels.noise import randn
from test_ddpm import M, V, exact, network, speaks_of_labels


def settings(**changes):
    old = dict(T=100, schedule="linear", predict="eps")
    return conftest.settings(ddim, **old | changes)


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "sigma-hat"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_equation_12_in_float64(eta, spacing, predict):
    hat = eta == "sigma-hat"
    steps, n, shape = 13, 4, (1, 3, 3)
    c = settings(eta=0.0 if hat else eta, sigma_hat=hat, spacing=spacing, predict=predict,
                 shape=shape)
    x = randn((n, *shape), c.seed, 0, stream=draws.START).double()
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps, spacing).tolist()
    for i in range(steps - 1, -1, -1):
        t, s = tau[i], tau[i - 1] if i else 0
        sigma_1 = ((1 - ab[s]) / (1 - ab[t])).sqrt() * (1 - ab[t] / ab[s]).sqrt()
        sigma = (1.0 if hat else eta) * sigma_1
        guess = exact(c, x, torch.full((n,), t), "eps")
        x0 = ((x - (1 - ab[t]).sqrt() * guess) / ab[t].sqrt()).clamp(-1, 1)
        eps = (x - ab[t].sqrt() * x0) / (1 - ab[t]).sqrt()  # of the clipped x0
        noise = ((1 - ab[t] / ab[s]).sqrt() if hat else sigma) if i else 0.0
        fresh = randn((n, *shape), c.seed, 0, t, draws.STEP).double()
        x = ab[s].sqrt() * x0 + (1 - ab[s] - sigma ** 2).clamp(min=0).sqrt() * eps + noise * fresh
    got = ddim.sample(c, network(c), 0, n, steps)
    assert_close(got.double(), x, atol=2e-5, rtol=1e-4)


def test_eta_1_has_the_posterior_of_ddpm():
    c = settings(eta=1.0)
    tau = timesteps(100, 17)
    ab = alpha_bar(c.schedule, 100)
    s = torch.cat([torch.zeros(1, dtype=torch.long), tau[:-1]])
    c_x, c_0, _, beta_tilde = posterior(ab[tau], ab[s])
    mine = ddim.walk(c, tau).double()
    for column, known in ((2, c_x), (3, c_0), (4, beta_tilde.sqrt())):
        assert_close(mine[:, column], known, atol=1e-6, rtol=1e-5)


def test_the_last_step_ends_at_clean_data():
    """alpha_bar[0] = 1: with K = 1 the sample is x0 as predicted.

    With any K the last step adds nothing.
    """
    for c in (settings(), settings(eta=1.0), settings(sigma_hat=True)):
        assert_close(ddim.walk(c, timesteps(100, 9))[0, 2:], torch.tensor([0., 1., 0.]))
    c = settings(shape=(2,))
    x = randn((5, 2), c.seed, 0, stream=draws.START)
    wanted = exact(c, x, torch.full((5,), 100), "x0")
    assert_close(ddim.sample(c, network(c), 0, 5, 1), wanted, atol=1e-4, rtol=1e-4)


def test_more_steps_come_closer_to_the_flow():
    """The probability flow of Gaussian data is known.

    x_0 = M + sqrt(V) (x_T - a_T M) / sqrt(a_T^2 V + s_T^2).
    """
    c = settings(T=1000, shape=(2,))
    ab = alpha_bar("linear", 1000)[-1]
    x_T = randn((2000, 2), 0, 0, stream=draws.START).double()
    flow = M + V ** 0.5 * (x_T - ab.sqrt() * M) / (ab * V + 1 - ab).sqrt()
    error = []
    for steps in (10, 50, 250, 1000):
        x = ddim.sample(c, network(c), 0, 2000, steps).double()
        error.append((x - flow).abs().max().item())
    assert all(b < 0.5 * a for a, b in zip(error, error[1:])) and error[-1] < 1e-2, error


def test_encoding_inverts_sampling():
    c = settings(T=1000, shape=(1, 4, 4))
    x0 = M + V ** 0.5 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x0[0, 0, 0, 0] = 1.7  # beyond [-1, 1]: nothing may clip it
    error = []
    for steps in (10, 50, 250, 1000):
        x_T = ddim.encode(c, network(c), x0, steps)
        back = ddim.sample(c, network(c), 0, 8, steps, x=x_T, clip=False)
        error.append((back - x0).abs().max().item())
    assert all(b < 0.6 * a for a, b in zip(error, error[1:])) and error[-1] < 0.02, error
    ab = alpha_bar("linear", 1000)[-1]  # and the noise is the flow's
    wanted = ab.sqrt() * M + (ab * V + 1 - ab).sqrt() * (x0 - M) / V ** 0.5
    assert_close(x_T, wanted.float(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_encoding_is_equation_13_upwards_in_float64(predict, spacing):
    """Each step asks the network where it stands, and about clean data as about t = 1."""
    c = settings(predict=predict, spacing=spacing, shape=(1, 3, 3))
    x0 = M + V ** 0.5 * torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = x0.double()
    ab, s = alpha_bar(c.schedule, c.T), 0
    for t in timesteps(c.T, 13, spacing).tolist():
        eps = exact(c, x, torch.full((4,), max(s, 1)), "eps")
        x = ab[s].rsqrt() * (x - (1 - ab[s]).sqrt() * eps)
        x = ab[t].sqrt() * x + (1 - ab[t]).sqrt() * eps
        s = t
    got = ddim.encode(c, network(c), x0, 13)
    assert_close(got.double(), x, atol=2e-5, rtol=1e-4)


def test_slerp():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 1, 8, 8, generator=g) for _ in range(2))
    assert_close(ddim.slerp(x, y, torch.tensor(0.0)), x)
    assert_close(ddim.slerp(x, y, torch.tensor(1.0)), y)
    unit = [v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (x, y)]
    between = ddim.slerp(*unit, torch.tensor(0.3))
    assert_close(between.flatten(1).norm(dim=1), torch.ones(3))
    assert_close(ddim.slerp(x, x, torch.tensor(0.5)), x)


def test_sampling_does_not_depend_on_how_it_is_split():
    c = settings(eta=1.0, shape=(1, 4, 4))
    whole = ddim.sample(c, network(c), 0, 6, 10)
    parts = [ddim.sample(c, network(c), first, n, 10) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)


def test_a_learned_variance_is_left_out():
    """A ddpm.py checkpoint's network says twice as much."""
    c, learned = settings(shape=(1, 2, 2)), settings(shape=(1, 2, 2), variance="learned")
    plain = ddim.sample(c, network(c), 0, 3, 5)
    assert_close(ddim.sample(learned, network(learned, 0.7), 0, 3, 5), plain)
    up = ddim.encode(c, network(c), plain, 5)
    assert_close(ddim.encode(learned, network(learned, 0.7), plain, 5), up)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_a_learned_variance_is_left_out_of_guidance_too(guidance):
    def net(x, t, label):
        out = speaks_of_labels(x, t, label)
        return torch.cat([out, 7 * out], 1)

    label = torch.tensor([0, 1, 1])
    given = dict(labels=2, conditional=True, T=20, shape=(2,), guidance=guidance)
    wanted = ddim.sample(settings(**given), speaks_of_labels, 0, 3, 5, label)
    got = ddim.sample(settings(variance="learned", **given), net, 0, 3, 5, label)
    assert_close(got, wanted)


def test_guidance_is_linear_in_its_weight():
    label = torch.tensor([0, 1, 1])
    one = {}
    for w in (0.0, 1.0, 3.0):
        c = settings(labels=2, conditional=True, T=20, shape=(2,), guidance=w)
        one[w] = ddim.sample(c, speaks_of_labels, 0, 3, 1, label)
    assert_close(one[3.0], one[0.0] + 3 * (one[1.0] - one[0.0]), atol=1e-4, rtol=1e-4)
    assert (one[3.0] - one[1.0]).abs().max() > 0.01
