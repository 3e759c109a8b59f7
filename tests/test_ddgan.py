"""ddgan.py's mathematics: tables against reference values, pairs and sampling against closed forms, losses, gradients."""
import dataclasses
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddgan
from common import runs, unet
from common.runs import NOISE
from common.schedules import alpha_bar
from kernels.noise import randn

CPU = torch.device("cpu")


def settings(**changes):
    fields = dataclasses.asdict(ddgan.Config()) | ddgan.GAN_ALONE | dict(labels=0, seed=3, device=CPU, precision="fp32", compile=False)
    return SimpleNamespace(**fields | changes)


def started(net):
    """The network beyond the zeros that it starts with."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


# -------------------------------------------------------------------------------------------------------- the tables
BETA = {1: [.999956], 2: [.921324, .999451], 4: [.478255, .849206, .956418, .987404],
        8: [.156445, .381493, .546501, .667488, .756197, .821240, .868930, .903898]}


@pytest.mark.parametrize("T", sorted(BETA))
def test_forward_steps_have_the_reference_betas(T):
    root_ab, s, root_a, root_beta = ddgan.tables(settings(T=T))[0].double()
    assert_close(root_beta[1:] ** 2, torch.tensor(BETA[T], dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(root_a ** 2 + root_beta ** 2, torch.ones(T + 1, dtype=torch.float64), atol=1e-6, rtol=0)
    product = torch.cumprod(1 - torch.tensor([0, *BETA[T]], dtype=torch.float64), 0)
    assert_close(root_ab[1:] ** 2, product[:-1], atol=3e-6, rtol=0)  # x_s comes from x0 by alpha_bar_s, s = t - 1
    assert_close(root_ab ** 2 + s ** 2, torch.ones(T + 1, dtype=torch.float64), atol=1e-6, rtol=0)


def test_reverse_steps_at_T_4_have_the_reference_values():
    _, _, c_x, c_0, c_n = ddgan.tables(settings(T=4))[1][1:].double().T
    for got, want in ((c_n ** 2, [0, .440819, .884202, .984061]), (c_0, [1, .665778, .269191, .057822]),
                      (c_x, [0, .201576, .193001, .111852])):
        assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fake", ["posterior", "renoise", "direct"])
def test_a_plain_gan_hands_over_what_G_makes(fake):
    assert ddgan.tables(settings(T=1, fake=fake))[1][1].tolist() == [0, 1, 0, 1, 0]


# --------------------------------------------------------------------------- what betrays re-noised pairs however good G is
@pytest.mark.parametrize("T", [2, 4, 8])
def test_renoised_pairs_differ_in_their_residual_variance_and_posterior_pairs_do_not(T):
    """Var(x_t - sqrt(1 - beta_t) x_s) given x0' = x0, in closed form from the tables and drawn by the script's own functions."""
    ab = alpha_bar("ddgan", T)
    excess = []
    for t in range(1, T + 1):
        a, beta = 1 - (beta := 1 - ab[t] / ab[t - 1]), beta
        variance = {}
        for fake in ("posterior", "renoise"):
            c = settings(T=T, fake=fake, batch=4, z=0)
            _, _, c_x, c_0, c_n = ddgan.tables(c)[1][t].double()
            on_x0 = ab[t].sqrt() * (1 - a.sqrt() * c_x) - a.sqrt() * c_0  # x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) n, s from both
            assert_close(on_x0, torch.zeros_like(on_x0), atol=1e-6, rtol=0)  # the mean betrays neither
            variance[fake] = (1 - a.sqrt() * c_x) ** 2 * (1 - ab[t]) + a * c_n ** 2

            x0 = torch.full((4, 1, 1, 100_000), 0.3)
            table, steps = ddgan.tables(c)[0], torch.full((4,), t)
            _, x_t = ddgan.real_pair(c, x0, steps, table, draw=0)
            perfect = lambda x, t, label, z: x0.atanh()
            x_s, x0_ = ddgan.fake_half(c, perfect, x_t, steps, ddgan.tables(c)[1], 0, None)
            assert_close(x0_, x0)
            drawn = (x_t - table[2, t] * x_s).double()
            assert_close(drawn.var(), variance[fake], rtol=0.012, atol=0)  # 4e5 draws: 0.0022 is one standard error
        assert_close(variance["posterior"], beta, atol=1e-6, rtol=0)  # what real pairs have
        assert_close(variance["renoise"], beta + 2 * a * (1 - ab[t - 1]), atol=1e-6, rtol=0)
        excess.append((variance["renoise"] / beta - 1).item())
    assert abs(excess[0]) < 1e-6 and excess[1] > 1e-3  # t = 1 hides it
    assert T != 4 or excess[1] == pytest.approx(0.17, abs=0.002)


def test_real_pairs_have_the_forward_process_moments():
    c, x0, t = settings(batch=4), torch.full((4, 100_000), 0.5), torch.full((4,), 2)
    ab = alpha_bar("ddgan", 4)
    x_s, x_t = ddgan.real_pair(c, x0, t, ddgan.tables(c)[0], draw=8)
    for x, at in ((x_s, ab[1]), (x_t, ab[2])):
        assert_close(x.double().mean(), 0.5 * at.sqrt(), atol=0.008, rtol=0)
        assert_close(x.double().var(), 1 - at, atol=0.012, rtol=0)
    assert_close((x_t.double() - (ab[2] / ab[1]).sqrt() * x_s).var(), 1 - ab[2] / ab[1], atol=0.01, rtol=0)


# ---------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("T", [1, 2, 4, 8])
@pytest.mark.parametrize("fake", ["posterior", "renoise"])
def test_a_generator_that_draws_from_the_true_posterior_gives_the_data(T, fake):
    """Data N(0.2, 0.1^2): then x0 given x_t is Gaussian, G draws from it by its z, and the samples must have the data's moments."""
    c, ab, mean, var = settings(T=T, fake=fake, z=2), alpha_bar("ddgan", T).float(), 0.2, 0.01

    def exact(x, t, label, z):
        at = ab[(t * T / 1000).round().long()].view(-1, 1, 1, 1)
        gain = at.sqrt() * var / (at * var + 1 - at)
        x0 = mean + gain * (x - at.sqrt() * mean) + (var * (1 - at) / (at * var + 1 - at)).sqrt() * z.view(-1, 1, 1, 2)
        return x0.atanh()
    x = ddgan.sample(c, exact, (1, 1, 2), 0, 40_000).double().view(-1, 2)
    assert_close(x.mean(0), torch.full((2,), mean, dtype=torch.float64), atol=0.003, rtol=0)
    assert_close(x.var(0), torch.full((2,), var, dtype=torch.float64), rtol=0.04, atol=0)
    assert abs(x.T.corrcoef()[0, 1]) < 0.02 and (x - mean).pow(4).mean() / var ** 2 == pytest.approx(3, abs=0.15)


def test_sampling_does_not_depend_on_the_batch():
    c = settings(z=3)
    net = lambda x, t, label, z: 0.5 * x + z.sum(1).view(-1, 1, 1, 1) / 4 + t.view(-1, 1, 1, 1) / 1000
    whole = ddgan.sample(c, net, (1, 4, 4), 0, 6)
    parts = torch.cat([ddgan.sample(c, net, (1, 4, 4), first, n) for first, n in ((0, 1), (1, 3), (4, 2))])
    assert_close(whole, parts, rtol=0, atol=1e-6)
    frames = []
    ddgan.sample(c, net, (1, 4, 4), 0, 2, frames=frames)
    assert len(frames) == 4


# ------------------------------------------------------------------------------------------------- losses and networks
def test_gradients_reach_G_through_the_posterior_step():
    """d x_s / d (what G puts out) = c_0 (1 - tanh^2), at each t; with --fake direct it is 1."""
    for fake in ("posterior", "renoise", "direct"):
        c = settings(fake=fake, batch=4, z=0)
        t = torch.tensor([1, 2, 3, 4])
        out = torch.tensor([0.3, -0.5, 0.1, 0.9]).view(4, 1, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
        x_s, _ = ddgan.fake_half(c, lambda x, t, label, z: out, torch.randn(4, 1, 2, 2), t, ddgan.tables(c)[1], 0, None)
        x_s.sum().backward()
        c_0 = ddgan.tables(c)[1][t][:, 3].view(4, 1, 1, 1)
        slope = torch.ones_like(out) if fake == "direct" else 1 - out.detach().tanh() ** 2
        assert_close(out.grad, c_0 * slope)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2,)])
def test_gradients_of_the_discriminator_reach_every_parameter_of_G(shape):
    c = settings(width=8, attention=(), width_d=8, batch=8, z=5)
    net, critic = started(ddgan.network(c, shape)), started(unet.Discriminator(shape, 8, 0))
    x_t = torch.randn(8, *shape)
    t = torch.arange(8) % 4 + 1
    x_s, _ = ddgan.fake_half(c, net, x_t, t, ddgan.tables(c)[1], 0, None)
    ddgan.gan_loss(c, critic(x_s, x_t, t * 250.0), True).mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_gan_losses_are_logarithms_of_probabilities():
    """Goodfellow 2014, G's being the one that does not saturate: it is D's for a real pair."""
    logit = torch.tensor([-3.0, -0.2, 0.0, 1.5, 6.0]).double()
    log_sure = lambda logit: (1 / (1 + (-logit).exp())).log()
    for kind in ("softplus", "bce"):
        c = settings(gan_loss=kind)
        assert_close(ddgan.gan_loss(c, logit, True), -log_sure(logit))
        assert_close(ddgan.gan_loss(c, logit, False), -log_sure(-logit))
    sure = torch.tensor([-40.0], requires_grad=True)  # D is certain that this is fake
    slope = {kind: torch.autograd.grad(ddgan.gan_loss(settings(gan_loss=kind), sure, True).sum(), sure)[0] for kind in ("softplus", "bce")}
    assert slope["softplus"] == -1 and slope["bce"].abs() < 1e-4  # G still learns; G learns nothing


@pytest.mark.parametrize("c", [settings(t_weights=(3, 11, 1, 1)), settings(), settings(T=3), settings(T=3, t_weights=(1, 2, 1), batch=24),
                               settings(t_weights=(3, 11, 1, 1), pretrain_t_weights=(7, 7, 1, 1), pretrain=600)],
                         ids=lambda c: f"{c.T} {c.t_weights} {c.pretrain}")
def test_each_t_has_its_share_and_fours_share_one(c, monkeypatch):
    shares = (c.pretrain_t_weights if c.pretrain else c.t_weights) or [1] * c.T
    want = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    drawn, counts = map(torch.stack, zip(*(ddgan.times(c, draw) for draw in range(22, 1022))))
    assert (drawn.unflatten(1, (-1, 4)) == drawn[:, ::4, None]).all()
    assert_close(drawn.flatten().bincount(minlength=c.T + 1)[1:] / drawn.numel(), want.float(), atol=0.02, rtol=0)
    assert_close(counts, torch.stack([t.bincount(minlength=c.T + 1)[1:] for t in drawn]))
    parts = []
    for rows in (slice(0, 12), slice(12, None)):  # of several processes: each its part of one batch, and the whole batch's counts
        monkeypatch.setattr(runs, "rows", lambda batch: rows)
        t, count = ddgan.times(c, 50)
        parts.append(t)
        assert_close(count, counts[28])
    assert_close(torch.cat(parts), drawn[28])


def test_of_four_latents_the_nearest_learns():
    """A generator that answers with its latent: x0' is the one of those tried that is nearest to x0, whatever the other samples have."""
    c = settings(z=2, batch=64)
    net, t = (lambda x_t, t, label, z: z), torch.full((64,), 2)
    x_t, x0 = randn((64, 2), 1), randn((64, 2), 2)
    answer = ddgan.fake_half(c, net, x_t, t, ddgan.tables(c)[1], 30, None, x0)[1]
    tried = randn((64, 4, 2), c.seed, 0, 32, NOISE)
    assert_close(answer, tried[torch.arange(64), torch.cdist(x0[:, None], tried)[:, 0].argmin(1)])
    assert_close(ddgan.fake_half(c, net, x_t, t, ddgan.tables(c)[1], 30, None)[1], randn((64, 2), c.seed, 0, 32, NOISE))  # the GAN's


def test_pretraining_s_shares_end_with_it():
    c = settings(pretrain=10, pretrain_t_weights=(13, 1, 1, 1), t_weights=(1, 1, 1, 13))
    assert [ddgan.times(c, draw)[0].mode().values.item() for draw in (2, 20, 21, 22, 23, 90)] == [1, 1, 1, 4, 4, 4]


@pytest.mark.parametrize("flags,want", [("--data digits", (0, 2e-4, 2e-4)), ("--lr 7e-4", (0, 7e-4, 2e-4)), ("--pretrain 9", (9, 2e-4, 2e-4)),
                                        ("--data gaussians", (0, 2e-3, 2e-3)), ("--data cifar10", (0, 1.6e-4, 1.25e-4))])
def test_a_plain_gan_has_rates_of_its_own_where_the_recipe_has_none(flags, want, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ddgan.py", "--train", "--T", "1", *flags.split()])
    c = runs.parse("ddgan", ddgan.Config, ddgan.RECIPES, "")
    ddgan.check(c)
    assert (c.pretrain, c.lr, c.lr_d) == want
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_one_shot_prediction_and_renoising_have_least_squares_only_where_they_teach(monkeypatch):
    """With --fake direct G makes x_s, which is mostly noise: its least squares would forbid the noise."""
    for flags, want in (("direct", (0, ())), ("renoise", (2600, (8.0, 0.0, 5.0, 5.0))), ("direct --pretrain 9 --recon 1,0,0,0", (9, (1.0, 0.0, 0.0, 0.0)))):
        monkeypatch.setattr("sys.argv", ["ddgan.py", "--train", "--fake", *flags.split()])
        c = runs.parse("ddgan", ddgan.Config, ddgan.RECIPES, "")
        ddgan.check(c)
        assert (c.pretrain, c.recon) == want
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_rates_fall_along_a_cosine_of_their_own_length():
    for lr, decay, want in ((2e-3, 100, {0: 2e-3, 25: 1.70857127e-3, 50: 1.005e-3, 100: 1e-5, 900: 1e-5}), (2e-3, 0, {0: 2e-3, 9000: 2e-3}),
                            (5e-6, 100, {0: 5e-6, 50: 5e-6, 200: 5e-6})):
        for iters in (50, 1000):
            for step, rate in want.items():
                assert ddgan.decayed(settings(decay=decay, iters=iters), lr, step) == pytest.approx(rate, rel=1e-6)


def test_minibatch_standard_deviation_is_of_four_consecutive_samples():
    torch.manual_seed(0)
    h = torch.randn(8, 3, 2, 2)
    got = unet.spread_of_fours(h)
    assert got.shape == (8, 1, 2, 2)
    for first in (0, 4):
        want = h[first:first + 4].double().std(0, correction=0).mean().float()
        assert_close(got[first:first + 4], want.expand(4, 1, 2, 2))
    assert_close(unet.spread_of_fours(h[4:]), got[4:])  # a process that has the second half
    assert unet.spread_of_fours(torch.randn(4, 5)).shape == (4, 1)
    x = torch.zeros(4, 2, 1, 1, requires_grad=True)  # four equal samples: a slope, not NaN
    unet.spread_of_fours(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 7, 7), (2,)])
def test_discriminator_takes_pairs_times_and_labels(shape):
    pictures = len(shape) == 3  # points have no labels
    critic = started(unet.Discriminator(shape, 8, 3 if pictures else 0))
    x_s, x_t = torch.randn(2, 8, *shape)
    label = torch.zeros(8, dtype=torch.long) if pictures else None
    one = critic(x_s, x_t, torch.full((8,), 250.0), label)
    assert one.shape == (8,)
    others = [critic(x_s, x_t, torch.full((8,), 500.0), label), critic(x_s, -x_t, torch.full((8,), 250.0), label)]
    if pictures:
        others.append(critic(x_s, x_t, torch.full((8,), 250.0), label + 1))
    for other in others:
        assert (one - other).abs().max() > 1e-4


def test_penalty_is_the_squared_gradient_on_real_pairs():
    """R1 by double backward, against differences of the logits in float64."""
    critic = started(unet.Discriminator((1, 8, 8), 4, 0)).double()
    x_s, x_t, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.full((4,), 250.0)
    got = ddgan.penalty(critic(x_s.requires_grad_(), x_t, t), x_s)
    grad = torch.zeros_like(x_s)
    with torch.no_grad():
        for i in range(64):
            step = torch.zeros(64, dtype=torch.float64)
            step[i] = 1e-6
            step = step.view(1, 1, 8, 8)
            for b in range(4):  # one sample at a time: the minibatch standard deviation mixes them
                e = torch.zeros_like(x_s)
                e[b] = step[0]
                grad[b].view(-1)[i] = (critic(x_s + e, x_t, t) - critic(x_s - e, x_t, t)).sum() / 2e-6
    assert_close(got, grad.square().flatten(1).sum(1).mean(), rtol=1e-5, atol=0)
    weight = critic.last.weight
    slope, = torch.autograd.grad(got, weight)
    assert slope.abs().max() > 0


@pytest.mark.parametrize("real,fake,spread,words", [
    ([.9, .6], [.6, .9], [.8, .7], None), ([1, .6], [.9, .9], [.8, .7], None), ([.9, .6], [.6, .9], [.8, .02], "varies at t = 2 "),
    ([.9, .6], [.6, .9], [.02, .8], None), ([.9, .6], [.6, .9], [.8, .8, .02], "varies at t = 3 "), ([.9, 1], [.6, 1], [.8, .7], "every fake one at t = 2,"), ([1, 1], [1, 1], [.8, .7], "t = 1, 2,")])
def test_collapse_and_a_discriminator_that_is_sure_are_named(real, fake, spread, words):
    told = ddgan.trouble(settings(T=3, recon=(8.0, 0.0, 0.1)), real, fake, spread)  # at t = 1 least squares decide
    assert told is None if words is None else words in told and "usually helps" in told
