"""shortcut_mcmc.py's mathematics, without training: Gaussian data and its best denoiser.

With it a chain of shortcuts is linear, so what its end is like is known; reference values were
computed apart from this code.
"""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import conftest
import shortcut_mcmc as shortcut
from common import draws
from common.schedules import before, timesteps
from kernels.diffuse import denoise_step
from kernels.noise import randn

# s and F / c^2 of even chains of K of 200 steps, for c^2 = 1 and 0.25
CHAINS = {1: (0.006693, 0.993307, 0.001682, 0.249580), 2: (0.021766, 1.008588, 0.057287, 0.263531),
          5: (0.219503, 1.216980, 0.237690, 0.309386), 10: (0.335843, 1.335781, 0.335040, 0.333760),
          20: (0.405259, 1.405259, 0.405258, 0.351315),
          50: (0.457914, 1.457914, 0.457913, 0.364478),
          200: (0.488814, 1.488814, 0.488813, 0.372203)}


def settings(**changes):
    old = dict(predict="eps", shape=(2,), fidelity=1.0, score="square", weight="bound")
    return conftest.settings(shortcut, **old | changes)


class Best(nn.Module):
    """The best denoiser of Gaussian data N(0, variance) in each value."""

    def __init__(self, c, variance):
        super().__init__()
        self.c, self.variance, self.times = c, variance, []

    def forward(self, x, time, label=None):
        self.times.append(time[0].item())
        gamma = shortcut.gamma_of(time.double()).view(-1, *[1] * (x.ndim - 1))
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        x0 = self.variance * alpha / (sigma ** 2 + self.variance * alpha ** 2) * x.double()
        eps = (x.double() - alpha * x0) / sigma
        return (eps if self.c.predict == "eps" else alpha * eps - sigma * x0).to(x.dtype)


def ends(c, tau, variance):
    """R and s of METHODS: the share of x0 in x0' at a chain's end, and Var(x0') / c^2, float64.

    By the coefficients of `walk`, step by step, from x_T = alpha_T x0 + sigma_T eps.
    """
    gamma = shortcut.gamma_of(torch.ones((), dtype=torch.float64))
    share, var = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)  # x_t = share x0 + noise of var
    table = shortcut.walk(c, tau, "renoise").double()
    for i in range(len(tau))[::-1]:
        snr = torch.exp(-shortcut.gamma_of(tau[i].double() / c.T))
        alpha = torch.sigmoid(-shortcut.gamma_of(tau[i].double() / c.T)).sqrt()
        gain = variance * snr / (1 + variance * snr) / alpha
        _, _, c_x, c_0, c_n = table[i]
        carried = c_x + c_0 * gain
        share, var = carried * share, carried ** 2 * var + c_n ** 2
    return share, (share ** 2 * variance + var) / variance


# ---------------------------------------------------------------------------------------- the chain
@pytest.mark.parametrize("K", CHAINS)
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_where_an_even_chain_ends(K, variance):
    """With the right model: its squares are worse than a constant's, and worse with more steps."""
    c = settings()
    share, s = ends(c, timesteps(200, K), variance)
    want = CHAINS[K][:2] if variance == 1 else CHAINS[K][2:]
    assert s.item() == pytest.approx(want[0], abs=2e-6)
    assert (variance * (1 - 2 * share + s)).item() == pytest.approx(want[1], abs=3e-6)


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("K", [1, 2, 10, 200])
def test_the_fidelity_of_the_best_denoiser(K, predict):
    """The code's own F, of 40,000 values."""
    c = settings(batch=20_000, predict=predict)
    x0, net = 0.5 * randn((20_000, 2), 1, step=9), Best(c, 0.25)
    with torch.no_grad():
        F = shortcut.fidelity(c, net, x0, *shortcut.descent(c, timesteps(200, K)),
                              torch.arange(20_000), None, 202)
    assert len(net.times) == K
    assert F.item() == pytest.approx(CHAINS[K][3], rel=4 * (2 / 40_000) ** 0.5)


def test_indices_that_are_not_even():
    tau = torch.tensor([50, 100, 200])
    for variance, want in ((1.0, 1.008745), (0.25, 1.054700)):
        share, s = ends(settings(), tau, variance)
        assert (1 - 2 * share + s).item() == pytest.approx(want, abs=1e-5)


class Linear(nn.Module):
    """x0' = A_k x_t at the k-th time: what a chain can do at all, if it is linear."""

    def __init__(self, c, tau, maps):
        super().__init__()
        self.table = shortcut.walk(c, tau, "renoise")
        self.maps = nn.Parameter(torch.tensor(maps))
        self.k = len(tau)

    def forward(self, x, time, label=None):
        self.k -= 1
        p_x, p_out = self.table[self.k, :2]
        return (self.maps[self.k] - p_x) / p_out * x


LEAK = [-97.789844, -0.125979]  # of t = 100 and 200: they cancel one noise for start and step


def test_no_chain_gets_below_what_x_T_tells(monkeypatch):
    """c^2 (1 - rho_T): less would be a leak of noise. The authors' one noise leaks all of it."""
    c, tau, n = settings(batch=4000), torch.tensor([100, 200]), 4000
    x0, which = randn((n, 2), 1, step=9), torch.arange(n)

    def F(maps):
        net = Linear(c, tau, maps)
        return shortcut.fidelity(c, net, x0, *shortcut.descent(c, tau), which, None, 202), net

    assert F(LEAK)[0] > 200
    best, maps = 9e9, [0.5, 0.05]
    for _ in range(60):  # downhill from a map of no use, a Newton step in each of the two maps
        value, net = F(maps)
        slope, = torch.autograd.grad(value, net.maps, create_graph=True)
        curvature = torch.stack([torch.autograd.grad(slope[i], net.maps, retain_graph=True)[0][i]
                                 for i in range(2)])
        maps = (net.maps - 0.5 * slope / curvature.clamp(min=1e-3)).tolist()
        best = min(best, value.item())
    sampled = x0.square().mean().item()  # of these x0, about 1
    assert 0.98 * 0.993307 < best / sampled < 1.02

    def one_noise(x, out, row, seed, which, number, stream):
        return denoise_step(x, out, row, seed, which, 202, stream)

    monkeypatch.setattr(shortcut, "denoise_step", one_noise)
    assert F(LEAK)[0] < 1e-6


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_a_chain_of_all_T_steps_is_the_loop_by_hand(predict):
    T, n = 12, 5
    c = settings(T=T, predict=predict, shape=(1, 2, 2), batch=n)
    net = Best(c, 0.3)
    tau = torch.arange(1, T + 1)
    which = torch.arange(n)
    start = randn((n, 1, 2, 2), 4)
    got = shortcut.chain(c, net, start, *shortcut.descent(c, tau), which, None, 70)
    x = start.double()
    for k, t in enumerate(range(T, 0, -1), 1):
        gamma = torch.tensor([-13.3 + 18.3 * t / T, -13.3 + 18.3 * (t - 1) / T]).double()
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        x0 = 0.3 * alpha[0] / (sigma[0] ** 2 + 0.3 * alpha[0] ** 2) * x
        eps = randn((n, 1, 2, 2), c.seed, which, 70 + k, draws.NOISE).double()
        x = alpha[1] * x0 + sigma[1] * eps
    assert_close(got.double(), x0, atol=1e-5, rtol=1e-4)  # the last step gives x0' itself
    assert net.times == pytest.approx([t / T for t in range(T, 0, -1)])


def test_the_gradient_reaches_the_first_step():
    c = settings(batch=8)
    tau = torch.tensor([40, 90, 200])
    net = Linear(c, tau, [0.9, 0.5, 0.1])
    F = shortcut.fidelity(c, net, randn((8, 2), 1), *shortcut.descent(c, tau), torch.arange(8),
                          None, 202)
    F.backward()
    assert (net.maps.grad.abs() > 1e-6).all(), net.maps.grad


@pytest.mark.parametrize("score", ["square", "energy"])
def test_a_chain_that_is_computed_anew_has_the_same_gradient(score):
    tau, x0 = torch.tensor([40, 90, 200]), randn((8, 2), 1)
    gradients = []
    for anew in (False, True):
        c = settings(batch=8, score=score, checkpoint_chain=anew)
        torch.manual_seed(0)
        net = shortcut.network(c)
        with torch.no_grad():
            net.last.weight += 0.1 * randn(net.last.weight.shape, 3)
        F = shortcut.fidelity(c, net, x0, *shortcut.descent(c, tau), torch.arange(8), None, 202)
        F.backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for kept, again in zip(*gradients):
        assert_close(kept, again)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0


# ----------------------------------------------------------------------------- numbers of an update
def test_an_update_s_steps_and_noises_are_its_own():
    c = settings()
    sets = {step: shortcut.visits(c, 10, draws.generator(0, draws.VISIT, step)).tolist()
            for step in range(1, 200)}
    for tau in sets.values():
        assert len(set(tau)) == 10 and tau == sorted(tau) and tau[0] >= 1 and tau[-1] == 200
    assert len({tuple(tau) for tau in sets.values()}) == 199
    again = shortcut.visits(c, 10, draws.generator(0, draws.VISIT, 7)).tolist()
    other = shortcut.visits(c, 10, draws.generator(1, draws.VISIT, 7)).tolist()
    assert sets[7] == again != other
    mean = torch.tensor([tau[:-1] for tau in sets.values()]).double().mean()
    assert abs(mean - 100) < 4 * 57.5 / (9 * 199) ** 0.5
    assert shortcut.visits(c, 1, draws.generator(0, draws.VISIT, 7)).tolist() == [200]
    assert shortcut.visits(c, 200, draws.generator(0, draws.VISIT, 7)).tolist() == [*range(1, 201)]


def test_no_two_noises_of_training_are_one(monkeypatch):
    """Start, steps, second chain and bound, over two updates in a row."""
    c = settings(batch=4, score="energy", K=3, T=3)
    seen = []

    def noted(x, a, s, seed, which, number, stream, return_eps=True):
        which = which if isinstance(which, torch.Tensor) else which + torch.arange(len(x))
        seen.extend((i, number) for i in which.tolist())
        return (x, x) if return_eps else x

    def stepped(x, out, row, seed, which, number, stream):
        seen.extend((i, number) for i in which.tolist())
        return x

    monkeypatch.setattr(shortcut, "add_noise", noted)
    monkeypatch.setattr(shortcut, "denoise_step", stepped)
    x0, which, net = randn((4, 2), 1), torch.arange(4), Best(c, 1.0)
    for step in (1, 2):
        start, number = shortcut.numbers_of(c, step)
        shortcut.bound(c, net, x0, torch.full((4,), 0.5), None, 0, number)
        chain = shortcut.descent(c, torch.tensor([1, 2, 3]))
        shortcut.fidelity(c, net, x0, *chain, which, None, start)
    assert len(seen) == len(set(seen)) == 2 * (4 + 4 + 3 * 8)


# --------------------------------------------------------------------------------------- the losses
def test_the_bound_of_the_best_denoiser():
    """Its mean over time is the closed form; METHODS: 5.956015 nats for c^2 = 0.25."""
    c = settings(batch=40_000)
    x0 = 0.5 * randn((40_000, 2), 1, step=9)
    time = (torch.arange(40_000) + 0.5) / 40_000
    L = shortcut.bound(c, Best(c, 0.25), x0, time, None, 0, 5)
    assert L.mean().item() == pytest.approx(5.956015, rel=0.02)
    c.weight = "sigmoid"
    weighted = shortcut.bound(c, Best(c, 0.25), x0, time, None, 0, 5)
    assert_close(weighted, L * torch.sigmoid(shortcut.gamma_of(time) + 2))


def test_times_that_are_not_even_have_the_same_mean():
    c = settings(weight="sigmoid")
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    time, counts = shortcut.drawn_times(c, u)

    def L(time):
        gamma = shortcut.gamma_of(time)
        snr = torch.exp(-gamma)
        return torch.sigmoid(gamma + 2) * snr / (1 + snr)

    assert (time.diff() > 0).all() and time[0] < 0.01 and time[-1] > 0.999
    assert_close((counts * L(time)).mean(), L(u).mean(), rtol=1e-5, atol=0)
    assert (counts * L(time)).std() < 0.5 * L(u).std()
    assert_close(counts[1:-1], (time[2:] - time[:-2]) * 10_000, rtol=1e-2, atol=0)
    assert shortcut.drawn_times(settings(), u)[0] is u


def test_an_energy_score_prefers_the_right_law_and_squares_do_not():
    """Of a guess N(0, s^2) at x0 ~ N(0, 1): 1.128379 at s = 1, 1.595769 at s = 0."""
    x0, a, b = (randn((200_000, 1), 1, step=k) for k in range(3))

    def energy(s):
        pairs = (x0, s * a), (x0, s * b), (s * a, s * b)
        first, second, apart = (shortcut.distance(*pair).mean().item() for pair in pairs)
        return first + second - apart

    assert energy(1) == pytest.approx(1.128379, abs=0.01)
    assert energy(0) == pytest.approx(1.595769, abs=0.01)
    assert energy(1) < min(energy(0.8), energy(1.25))
    assert (x0 - a).square().mean() > x0.square().mean()  # squares: the constant wins


def test_the_best_denoiser_s_chain_is_near_the_least_energy_and_not_there():
    """x0' ~ N(0, s) for c^2 = 1, K = 10, where x_T tells next to nothing of x0."""
    c = settings(score="energy", batch=40_000, shape=(1,))
    x0 = randn((40_000, 1), 1, step=9)
    share, s = ends(c, timesteps(200, 10), 1.0)
    # E|x0 - x0'| and E|x0' - x0''| of normals; what x_T gives to both chains is left out: R = .05
    first, apart = (1 + s - 2 * share).sqrt(), (2 * s).sqrt()
    want = ((2 * first - apart) * (2 / torch.pi) ** 0.5).item()
    with torch.no_grad():
        tau = timesteps(200, 10)
        F = shortcut.fidelity(c, Best(c, 1.0), x0, *shortcut.descent(c, tau),
                              torch.arange(40_000), None, 202).item()
    assert F == pytest.approx(want, abs=0.02) and 1.128379 + 0.03 < F < 1.595769 - 0.3


def test_the_energy_of_a_chain_prefers_the_right_spread():
    """F of a network that shrinks or widens x0' is larger than of one that has the data's law."""
    c = settings(score="energy", batch=20_000)
    x0, which, tau = randn((20_000, 2), 1, step=9), torch.arange(20_000), torch.tensor([199, 200])
    # x_199 is nearly all noise, the chain's own, which the last step turns into x0' = m x_199
    F = [shortcut.fidelity(c, Linear(c, tau, [m, 0.0]), x0, *shortcut.descent(c, tau), which, None,
                           202).item()
         for m in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert F[2] == min(F) and F[0] > F[1] > F[2] < F[3] < F[4], F


# ----------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("update,steps,want", [
    ("renoise", 10, 0.335046), ("renoise", 200, 0.488820), ("ancestral", 10, None),
    ("ancestral", 200, None), ("flow", 10, None), ("flow", 200, None)])
def test_what_the_samplers_keep_of_a_gaussian(update, steps, want):
    c = settings(update=update)
    net = Best(c, 0.25)
    x = shortcut.sample(c, net, 0, 20_000, steps).double()
    assert len(net.times) == steps
    tau, var = timesteps(200, steps), torch.ones((), dtype=torch.float64)
    for t, s in zip(tau.flip(0).tolist(), before(tau).flip(0).tolist()):
        gamma = torch.tensor([-13.3 + 18.3 * t / 200, -13.3 + 18.3 * s / 200]).double()
        a, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        if s == 0:
            a[1], sigma[1] = 1, 0
        gain = 0.25 * a[0] / (sigma[0] ** 2 + 0.25 * a[0] ** 2)
        if update == "renoise":
            var = (a[1] * gain) ** 2 * var + sigma[1] ** 2
        elif update == "flow":  # eps' = (x - alpha x0') / sigma
            var = (a[1] * gain + sigma[1] * (1 - a[0] * gain) / sigma[0]) ** 2 * var
        else:  # Ho 2020, equation 7, of that stride
            ratio = (a[0] / a[1]) ** 2
            c_x = ratio.sqrt() * sigma[1] ** 2 / sigma[0] ** 2
            c_0 = a[1] * (1 - ratio) / sigma[0] ** 2
            var = (c_x + c_0 * gain) ** 2 * var + sigma[1] ** 2 * (1 - ratio) / sigma[0] ** 2
    if want is not None:
        assert (var / 0.25).item() == pytest.approx(want, abs=2e-4)
    assert abs(x.var() / var - 1) < 4 * (2 / x.numel()) ** 0.5


@pytest.mark.parametrize("spacing", ["even", "random"])
def test_exactly_as_many_evaluations_at_one_set_of_steps(spacing):
    for steps in (1, 2, 7, 199, 200):
        times = []
        for first, n in ((0, 2), (5, 1)):
            c = settings(spacing=spacing)
            net = Best(c, 0.25)
            shortcut.sample(c, net, first, n, steps)
            assert len(net.times) == steps and net.times[0] == 1
            assert net.times == sorted(set(net.times), reverse=True)
            times.append(net.times)
        assert times[0] == times[1]
    net = Best(c, 0.25)
    c.seed = 1
    shortcut.sample(c, net, 0, 1, 7)
    c.seed = 0
    other = Best(c, 0.25)
    shortcut.sample(c, other, 0, 1, 7)
    assert (net.times != other.times) == (spacing == "random")


def test_sampling_does_not_depend_on_how_it_is_split():
    c = settings(shape=(1, 4, 4))
    net = Best(c, 0.25)
    whole = shortcut.sample(c, net, 0, 6, 10)
    parts = [shortcut.sample(c, net, first, n, 10) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
