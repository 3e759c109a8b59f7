"""ddim.py's mathematics, without training: a network known in closed form, and the paper's equations written out in float64."""
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddim
from common import runs
from common.schedules import alpha_bar, posterior, timesteps
from kernels.noise import randn
from test_ddpm import M, V, exact, network
from test_ddpm import settings as ddpm_settings


def settings(**more):
    return ddpm_settings(**{**dict(eta=0.0, sigma_hat=False, spacing="linear", variance="none"), **more})


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "sigma-hat"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_equation_12_in_float64(eta, spacing, predict):
    hat = eta == "sigma-hat"
    c = settings(eta=0.0 if hat else eta, sigma_hat=hat, spacing=spacing, predict=predict)
    steps, n, shape = 13, 4, (1, 3, 3)
    x = randn((n, *shape), c.seed, 0, stream=runs.START).double()
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps, spacing).tolist()
    for i in range(steps - 1, -1, -1):
        t, s = tau[i], tau[i - 1] if i else 0
        sigma = (1.0 if hat else eta) * ((1 - ab[s]) / (1 - ab[t])).sqrt() * (1 - ab[t] / ab[s]).sqrt()
        x0 = ((x - (1 - ab[t]).sqrt() * exact(c, x, torch.full((n,), t), "eps")) / ab[t].sqrt()).clamp(-1, 1)
        eps = (x - ab[t].sqrt() * x0) / (1 - ab[t]).sqrt()  # of the clipped x0
        noise = ((1 - ab[t] / ab[s]).sqrt() if hat else sigma) if i else 0.0
        x = ab[s].sqrt() * x0 + (1 - ab[s] - sigma ** 2).clamp(min=0).sqrt() * eps \
            + noise * randn((n, *shape), c.seed, 0, t, runs.STEP).double()
    assert_close(ddim.sample(c, network(c), shape, 0, n, steps).double(), x, atol=2e-5, rtol=1e-4)


def test_eta_1_has_the_posterior_of_ddpm():
    c = settings(eta=1.0)
    tau = timesteps(100, 17)
    ab = alpha_bar(c.schedule, 100)
    c_x, c_0, _, beta_tilde = posterior(ab[tau], ab[torch.cat([torch.zeros(1, dtype=torch.long), tau[:-1]])])
    mine = ddim.step_coefficients(c, tau).double()
    for column, known in ((2, c_x), (3, c_0), (4, beta_tilde.sqrt())):
        assert_close(mine[:, column], known, atol=1e-6, rtol=1e-5)


def test_the_last_step_ends_at_clean_data():
    """alpha_bar[0] = 1: with K = 1 the sample is x0 as predicted, and with any K the last step adds nothing."""
    for c in (settings(), settings(eta=1.0), settings(sigma_hat=True)):
        assert_close(ddim.step_coefficients(c, timesteps(100, 9))[0, 2:], torch.tensor([0., 1., 0.]))
    c = settings()
    x = randn((5, 2), c.seed, 0, stream=runs.START)
    assert_close(ddim.sample(c, network(c), (2,), 0, 5, 1), exact(c, x, torch.full((5,), 100), "x0"), atol=1e-4, rtol=1e-4)


def test_more_steps_come_closer_to_the_flow():
    """The probability flow of Gaussian data is known: x_0 = M + sqrt(V) (x_T - a_T M) / sqrt(a_T^2 V + s_T^2)."""
    c = settings(T=1000)
    ab = alpha_bar("linear", 1000)[-1]
    x_T = randn((2000, 2), 0, 0, stream=runs.START).double()
    flow = M + V ** 0.5 * (x_T - ab.sqrt() * M) / (ab * V + 1 - ab).sqrt()
    error = [(ddim.sample(c, network(c), (2,), 0, 2000, k).double() - flow).abs().max().item() for k in (10, 50, 250, 1000)]
    assert all(b < 0.5 * a for a, b in zip(error, error[1:])) and error[-1] < 1e-2, error


def test_encoding_inverts_sampling():
    c = settings(T=1000)
    x0 = (M + V ** 0.5 * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    x0[0, 0, 0, 0] = 1.7  # beyond [-1, 1]: nothing may clip it
    error = []
    for steps in (10, 50, 250, 1000):
        x_T = ddim.encode(c, network(c), x0, steps)
        error.append((ddim.sample(c, network(c), (1, 4, 4), 0, 8, steps, x=x_T, clip=False) - x0).abs().max().item())
    assert all(b < 0.6 * a for a, b in zip(error, error[1:])) and error[-1] < 0.02, error
    ab = alpha_bar("linear", 1000)[-1]  # and the noise is the flow's
    wanted = ab.sqrt() * M + (ab * V + 1 - ab).sqrt() * (x0 - M) / V ** 0.5
    assert_close(x_T, wanted.float(), atol=0.05, rtol=0.02)


def test_slerp():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 1, 8, 8, generator=g) for _ in range(2))
    assert_close(ddim.slerp(x, y, torch.tensor(0.0)), x)
    assert_close(ddim.slerp(x, y, torch.tensor(1.0)), y)
    unit = [v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (x, y)]
    assert_close(ddim.slerp(*unit, torch.tensor(0.3)).flatten(1).norm(dim=1), torch.ones(3))
    assert_close(ddim.slerp(x, x, torch.tensor(0.5)), x)


def test_sampling_does_not_depend_on_how_it_is_split():
    c = settings(eta=1.0)
    whole = ddim.sample(c, network(c), (1, 4, 4), 0, 6, 10)
    parts = torch.cat([ddim.sample(c, network(c), (1, 4, 4), first, size, 10) for first, size in ((0, 1), (1, 3), (4, 2))])
    assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_a_learned_variance_is_left_out():
    c = SimpleNamespace(**{**vars(settings()), "variance": "learned"})
    plain = ddim.sample(settings(), network(settings()), (1, 2, 2), 0, 3, 5)
    assert_close(ddim.sample(c, network(c, 0.7), (1, 2, 2), 0, 3, 5), plain)
