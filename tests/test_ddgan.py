"""ddgan.py's mathematics, without training.

Tables against reference values, pairs and sampling against closed forms, losses, gradients.
"""
import pytest
import torch
from torch.testing import assert_close

import conftest
import ddgan
from common import draws, flags
from common.draws import NOISE
from common.schedules import alpha_bar
from kernels.noise import randn

HALVES = (ddgan.D_HALF, ddgan.G_HALF)
AT = ddgan.places(0, ddgan.D_HALF)  # where it does not matter under which numbers noise is drawn


def settings(**changes):
    return conftest.settings(ddgan, **ddgan.GAN_ALONE | dict(seed=3) | changes)


def started(net):
    """The network beyond the zeros that it starts with."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


# ------------------------------------------------------------------------------------- the tables
BETA = {1: [.999956], 2: [.921324, .999451], 4: [.478255, .849206, .956418, .987404],
        8: [.156445, .381493, .546501, .667488, .756197, .821240, .868930, .903898]}


@pytest.mark.parametrize("T", sorted(BETA))
def test_forward_steps_have_the_reference_betas(T):
    table = ddgan.forward(settings(T=T))
    assert table.shape == (T, 4) and table.dtype == torch.float32
    signal, noise, keep, fresh = table.double().unbind(1)
    assert_close(fresh ** 2, torch.tensor(BETA[T], dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(keep ** 2 + fresh ** 2, torch.ones(T).double(), atol=1e-6, rtol=0)
    product = torch.cumprod(1 - torch.tensor([0, *BETA[T]], dtype=torch.float64), 0)
    # x_s comes from x0 by alpha_bar_s, s = t - 1
    assert_close(signal ** 2, product[:-1], atol=3e-6, rtol=0)
    assert_close(signal ** 2 + noise ** 2, torch.ones(T).double(), atol=1e-6, rtol=0)


def test_reverse_steps_at_T_4_have_the_reference_values():
    table = ddgan.walk(settings(T=4))
    assert table.shape == (4, 5) and table.dtype == torch.float32
    p_x, p_out, c_x, c_0, c_n = table.double().unbind(1)
    assert (p_x == 0).all() and (p_out == 1).all()  # G makes x0' itself
    for got, want in ((c_n ** 2, [0, .440819, .884202, .984061]),
                      (c_0, [1, .665778, .269191, .057822]),
                      (c_x, [0, .201576, .193001, .111852])):
        assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fake", ["posterior", "renoise", "direct"])
def test_a_plain_gan_hands_over_what_G_makes(fake):
    assert ddgan.walk(settings(T=1, fake=fake)).tolist() == [[0, 1, 0, 1, 0]]


# ---------------------------------------------------------------------------- the noise's numbers
def test_every_draw_of_training_has_a_number_of_its_own():
    numbers = []
    for step in range(1, 200):
        for half in HALVES:
            at = ddgan.places(step, half)
            assert tuple(at) == tuple(8 * step + 4 * half + k for k in (0, 1, 2, 3))
            assert (at.x_s, at.x_t, at.z, at.x_f) == tuple(at)
            numbers += at
    assert len(set(numbers)) == len(numbers) == 199 * 2 * 4


def test_pairs_do_not_depend_on_how_the_batch_is_split():
    """`first` says which sample of the batch is the first, for each normal that is drawn."""
    c = settings(batch=8, z=3)
    x0, t = randn((8, 2), 1), torch.tensor([1, 2, 3, 4] * 2)
    noising, reverse = ddgan.forward(c), ddgan.walk(c)

    def net(x, t, label, z):
        return x + z[:, :2]

    def pairs(at, rows):
        x_s, x_t = ddgan.real_pair(c, x0[rows], t[rows], noising, rows.start, at)
        made = []
        for wanted in (None, x0[rows]):
            made += ddgan.fake_half(c, net, x_t, t[rows], reverse, rows.start, at, None, wanted)
        return [x_s, x_t, *made]
    at = ddgan.places(5, ddgan.G_HALF)
    whole = pairs(at, slice(0, 8))
    parts = zip(*(pairs(at, rows) for rows in (slice(0, 3), slice(3, 4), slice(4, 8))))
    for got, want in zip(parts, whole, strict=True):
        assert_close(torch.cat(got), want, rtol=0, atol=1e-6)
    for other, one in zip(pairs(ddgan.places(5, ddgan.D_HALF), slice(0, 8)), whole):
        assert (other - one).abs().max() > 0.01


# -------------------------------------------------- what betrays re-noised pairs however good G is
@pytest.mark.parametrize("T", [2, 4, 8])
def test_renoised_pairs_differ_in_their_residual_variance_and_posterior_pairs_do_not(T):
    """Var(x_t - sqrt(1 - beta_t) x_s) given x0' = x0.

    In closed form from the tables, and drawn by the script's own functions.
    """
    ab = alpha_bar("ddgan", T)
    excess = []
    for t in range(1, T + 1):
        beta = 1 - ab[t] / ab[t - 1]
        a = 1 - beta
        variance = {}
        for fake in ("posterior", "renoise"):
            c = settings(T=T, fake=fake, batch=4, z=0)
            _, _, c_x, c_0, c_n = ddgan.walk(c)[t - 1].double()
            # x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) n, s from both; the mean betrays neither
            on_x0 = ab[t].sqrt() * (1 - a.sqrt() * c_x) - a.sqrt() * c_0
            assert_close(on_x0, torch.zeros_like(on_x0), atol=1e-6, rtol=0)
            variance[fake] = (1 - a.sqrt() * c_x) ** 2 * (1 - ab[t]) + a * c_n ** 2

            x0 = torch.full((4, 1, 1, 100_000), 0.3)
            table, steps = ddgan.forward(c), torch.full((4,), t)
            _, x_t = ddgan.real_pair(c, x0, steps, table, 0, AT)

            def perfect(x, t, label, z):
                return x0.atanh()
            x_s, x0_ = ddgan.fake_half(c, perfect, x_t, steps, ddgan.walk(c), 0, AT, None)
            assert_close(x0_, x0)
            drawn = (x_t - table[t - 1, 2] * x_s).double()
            # 4e5 draws: 0.0022 is one standard error
            assert_close(drawn.var(), variance[fake], rtol=0.012, atol=0)
        assert_close(variance["posterior"], beta, atol=1e-6, rtol=0)  # what real pairs have
        assert_close(variance["renoise"], beta + 2 * a * (1 - ab[t - 1]), atol=1e-6, rtol=0)
        excess.append((variance["renoise"] / beta - 1).item())
    assert abs(excess[0]) < 1e-6 and excess[1] > 1e-3  # t = 1 hides it
    assert T != 4 or excess[1] == pytest.approx(0.17, abs=0.002)


def test_real_pairs_have_the_forward_process_moments():
    c, x0, t = settings(batch=4), torch.full((4, 100_000), 0.5), torch.full((4,), 2)
    ab = alpha_bar("ddgan", 4)
    x_s, x_t = ddgan.real_pair(c, x0, t, ddgan.forward(c), 0, ddgan.places(1, ddgan.D_HALF))
    for x, signal2 in ((x_s, ab[1]), (x_t, ab[2])):
        assert_close(x.double().mean(), 0.5 * signal2.sqrt(), atol=0.008, rtol=0)
        assert_close(x.double().var(), 1 - signal2, atol=0.012, rtol=0)
    fresh = x_t.double() - (ab[2] / ab[1]).sqrt() * x_s
    assert_close(fresh.var(), 1 - ab[2] / ab[1], atol=0.01, rtol=0)


# --------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("T", [1, 2, 4, 8])
@pytest.mark.parametrize("fake", ["posterior", "renoise"])
def test_a_generator_that_draws_from_the_true_posterior_gives_the_data(T, fake):
    """Data N(0.2, 0.1^2): then x0 given x_t is Gaussian, and G draws from it by its z.

    The samples must have the data's moments.
    """
    c = settings(T=T, fake=fake, z=2, shape=(1, 1, 2))
    ab, mean, var = alpha_bar("ddgan", T).float(), 0.2, 0.01

    def exact(x, t, label, z):
        signal2 = ab[(t * T).round().long()].view(-1, 1, 1, 1)
        total = signal2 * var + 1 - signal2
        gain = signal2.sqrt() * var / total
        x0 = mean + gain * (x - signal2.sqrt() * mean)
        x0 = x0 + (var * (1 - signal2) / total).sqrt() * z.view(-1, 1, 1, 2)
        return x0.atanh()
    x = ddgan.sample(c, exact, 0, 40_000).double().view(-1, 2)
    assert_close(x.mean(0), torch.full((2,), mean, dtype=torch.float64), atol=0.003, rtol=0)
    assert_close(x.var(0), torch.full((2,), var, dtype=torch.float64), rtol=0.04, atol=0)
    assert abs(x.T.corrcoef()[0, 1]) < 0.02
    assert (x - mean).pow(4).mean() / var ** 2 == pytest.approx(3, abs=0.15)


def test_sampling_does_not_depend_on_the_batch():
    c = settings(z=3, shape=(1, 4, 4))

    def net(x, t, label, z):
        return 0.5 * x + z.sum(1).view(-1, 1, 1, 1) / 4 + t.view(-1, 1, 1, 1)
    whole = ddgan.sample(c, net, 0, 6)
    parts = [ddgan.sample(c, net, first, n) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)
    frames = []
    ddgan.sample(c, net, 0, 2, frames=frames)
    assert len(frames) == 4


@pytest.mark.parametrize("T", [1, 4])
def test_sampling_takes_each_step_once(T):
    c = settings(T=T, z=0, shape=(2,))

    def net(x, t, label, z):
        return x
    for steps in (0, T - 1, T + 1, 50):
        if steps != T:
            with pytest.raises(ValueError, match=f"each of its {T} steps once"):
                ddgan.sample(c, net, 0, 2, steps)
    assert_close(ddgan.sample(c, net, 0, 2, T), ddgan.sample(c, net, 0, 2), rtol=0, atol=0)


# ----------------------------------------------------------------------------- losses and networks
def test_gradients_reach_G_through_the_posterior_step():
    """d x_s / d (what G puts out) = c_0 (1 - tanh^2), at each t; with --fake direct it is 1."""
    for fake in ("posterior", "renoise", "direct"):
        c = settings(fake=fake, batch=4, z=0)
        t = torch.tensor([1, 2, 3, 4])
        out = torch.tensor([0.3, -0.5, 0.1, 0.9]).view(4, 1, 1, 1).repeat(1, 1, 2, 2)
        out.requires_grad_()

        def net(x, t, label, z):
            return out
        table = ddgan.walk(c)
        x_s, _ = ddgan.fake_half(c, net, torch.randn(4, 1, 2, 2), t, table, 0, AT, None)
        x_s.sum().backward()
        c_0 = table[t - 1, 3].view(4, 1, 1, 1)
        slope = torch.ones_like(out) if fake == "direct" else 1 - out.detach().tanh() ** 2
        assert_close(out.grad, c_0 * slope)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2,)])
def test_gradients_of_the_discriminator_reach_every_parameter_of_G(shape):
    c = settings(width=8, attention=(), width_d=8, batch=8, z=5, shape=shape)
    net = started(ddgan.network(c))
    critic = started(ddgan.Discriminator(shape, 8, 0))
    x_t = torch.randn(8, *shape)
    t = torch.arange(8) % 4 + 1
    x_s, _ = ddgan.fake_half(c, net, x_t, t, ddgan.walk(c), 0, AT, None)
    logit = critic(x_s, x_t, t / 4)
    assert_close(ddgan.logits(c, critic, x_s, x_t, t, None), logit)
    ddgan.gan_loss(c, logit, True).mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_gan_losses_are_logarithms_of_probabilities():
    """Goodfellow 2014, G's being the one that does not saturate: it is D's for a real pair."""
    logit = torch.tensor([-3.0, -0.2, 0.0, 1.5, 6.0]).double()

    def log_sure(logit):
        return (1 / (1 + (-logit).exp())).log()
    sure = torch.tensor([-40.0], requires_grad=True)  # D is certain that this is fake
    slope = {}
    for kind in ("softplus", "bce"):
        c = settings(gan_loss=kind)
        assert_close(ddgan.gan_loss(c, logit, True), -log_sure(logit))
        assert_close(ddgan.gan_loss(c, logit, False), -log_sure(-logit))
        assert_close(ddgan.generator_loss(c, logit), -log_sure(logit))
        other = logit.flip(0) + 0.5
        both = -log_sure(logit) - log_sure(-other)
        assert_close(ddgan.discriminator_loss(c, logit, other), both)
        slope[kind], = torch.autograd.grad(ddgan.gan_loss(c, sure, True).sum(), sure)
    assert slope["softplus"] == -1 and slope["bce"].abs() < 1e-4  # G still learns; G learns nothing


@pytest.mark.parametrize("c", [
    settings(t_weights=(3, 11, 1, 1)), settings(), settings(T=3),
    settings(T=3, t_weights=(1, 2, 1), batch=24),
    settings(t_weights=(3, 11, 1, 1), pretrain_t_weights=(7, 7, 1, 1), pretrain=600)],
    ids=lambda c: f"{c.T} {c.t_weights} {c.pretrain}")
def test_each_t_has_its_share_and_fours_share_one(c, monkeypatch):
    shares = (c.pretrain_t_weights if c.pretrain else c.t_weights) or [1] * c.T
    want = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    both = [ddgan.times(c, step, half) for step in range(11, 511) for half in HALVES]
    drawn, counts = map(torch.stack, zip(*both))
    assert (drawn.unflatten(1, (-1, 4)) == drawn[:, ::4, None]).all()
    share = drawn.flatten().bincount(minlength=c.T + 1)[1:] / drawn.numel()
    assert_close(share, want.float(), atol=0.02, rtol=0)
    assert_close(counts, torch.stack([t.bincount(minlength=c.T + 1)[1:] for t in drawn]))
    # of several processes: each has its part of one batch, and the whole batch's counts
    parts = []
    for rows in (slice(0, 12), slice(12, None)):
        monkeypatch.setattr(draws, "part", lambda batch: rows)
        t, count = ddgan.times(c, 25, ddgan.D_HALF)
        parts.append(t)
        assert_close(count, counts[28])
    assert_close(torch.cat(parts), drawn[28])


def test_of_four_latents_the_nearest_learns():
    """A generator that answers with its latent.

    x0' is the one of those tried that is nearest to x0, whatever the other samples have.
    """
    c = settings(z=2, batch=64)

    def net(x_t, t, label, z):
        return z
    t, table, at = torch.full((64,), 2), ddgan.walk(c), ddgan.places(3, ddgan.G_HALF)
    x_t, x0 = randn((64, 2), 1), randn((64, 2), 2)
    tried = randn((64, 4, 2), c.seed, 0, 8 * 3 + 4 + 2, NOISE)
    nearest = tried[torch.arange(64), torch.cdist(x0[:, None], tried)[:, 0].argmin(1)]
    assert_close(ddgan.fake_half(c, net, x_t, t, table, 0, at, None, x0)[1], nearest)
    assert_close(ddgan.nearest(c, net, x_t, t, tried, None, x0), nearest)
    alone = randn((64, 2), c.seed, 0, 8 * 3 + 4 + 2, NOISE)  # the GAN's
    assert_close(ddgan.fake_half(c, net, x_t, t, table, 0, at, None)[1], alone)


def test_pretraining_s_shares_end_with_it():
    c = settings(pretrain=10, pretrain_t_weights=(13, 1, 1, 1), t_weights=(1, 1, 1, 13))
    often = []
    for step, half in ((1, 0), (10, 0), (10, 1), (11, 0), (11, 1), (45, 0)):
        often.append(ddgan.times(c, step, half)[0].mode().values.item())
    assert often == [1, 1, 1, 4, 4, 4]


def parsed(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["ddgan.py", "--train", *given])
    c = flags.parse("ddgan", ddgan.FLAGS, ddgan.RECIPES, "")
    ddgan.check(c)
    return c


@pytest.mark.parametrize("given,want", [("--data digits", (0, 2e-4, 2e-4)),
                                        ("--lr 7e-4", (0, 7e-4, 2e-4)),
                                        ("--pretrain 9", (9, 2e-4, 2e-4)),
                                        ("--data gaussians", (0, 2e-3, 2e-3)),
                                        ("--data cifar10", (0, 1.6e-4, 1.25e-4))])
def test_a_plain_gan_has_rates_of_its_own_where_the_recipe_has_none(given, want, monkeypatch):
    c = parsed(monkeypatch, "--T", "1", *given.split())
    assert (c.pretrain, c.lr, c.lr_d) == want


def test_one_shot_prediction_and_renoising_have_least_squares_only_where_they_teach(monkeypatch):
    """With --fake direct G makes x_s, mostly noise: least squares would forbid the noise."""
    own = "direct --pretrain 9 --recon 1,0,0,0"
    for given, want in (("direct", (0, ())), ("renoise", (2600, (8.0, 0.0, 5.0, 5.0))),
                        (own, (9, (1.0, 0.0, 0.0, 0.0)))):
        c = parsed(monkeypatch, "--fake", *given.split())
        assert (c.pretrain, c.recon) == want


def test_rates_fall_along_a_cosine_of_their_own_length():
    falling = {0: 2e-3, 25: 1.70857127e-3, 50: 1.005e-3, 100: 1e-5, 900: 1e-5}
    for lr, decay, want in ((2e-3, 100, falling), (2e-3, 0, {0: 2e-3, 9000: 2e-3}),
                            (5e-6, 100, {0: 5e-6, 50: 5e-6, 200: 5e-6})):
        for iters in (50, 1000):
            c = settings(decay=decay, iters=iters)
            for step, rate in want.items():
                assert ddgan.decayed(c, lr, step) == pytest.approx(rate, rel=1e-6)


def test_minibatch_standard_deviation_is_of_four_consecutive_samples():
    torch.manual_seed(0)
    h = torch.randn(8, 3, 2, 2)
    got = ddgan.spread_of_fours(h)
    assert got.shape == (8, 1, 2, 2)
    for first in (0, 4):
        want = h[first:first + 4].double().std(0, correction=0).mean().float()
        assert_close(got[first:first + 4], want.expand(4, 1, 2, 2))
    assert_close(ddgan.spread_of_fours(h[4:]), got[4:])  # a process that has the second half
    assert ddgan.spread_of_fours(torch.randn(4, 5)).shape == (4, 1)
    x = torch.zeros(4, 2, 1, 1, requires_grad=True)  # four equal samples: a slope, not NaN
    ddgan.spread_of_fours(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 7, 7), (2,)])
def test_discriminator_takes_pairs_times_and_labels(shape):
    pictures = len(shape) == 3  # points have no labels
    critic = started(ddgan.Discriminator(shape, 8, 3 if pictures else 0))
    x_s, x_t = torch.randn(2, 8, *shape)
    label = torch.zeros(8, dtype=torch.long) if pictures else None
    t = torch.full((8,), 0.25)
    one = critic(x_s, x_t, t, label)
    assert one.shape == (8,)
    others = [critic(x_s, x_t, 2 * t, label), critic(x_s, -x_t, t, label)]
    if pictures:
        others.append(critic(x_s, x_t, t, label + 1))
    for other in others:
        assert (one - other).abs().max() > 1e-4


def test_penalty_is_the_squared_gradient_on_real_pairs():
    """R1 by double backward, against differences of the logits in float64."""
    critic = started(ddgan.Discriminator((1, 8, 8), 4, 0)).double()
    x_s = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    x_t = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    t = torch.full((4,), 0.25)
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
                difference = critic(x_s + e, x_t, t) - critic(x_s - e, x_t, t)
                grad[b].view(-1)[i] = difference.sum() / 2e-6
    assert_close(got, grad.square().flatten(1).sum(1).mean(), rtol=1e-5, atol=0)
    weight = critic.last.weight
    slope, = torch.autograd.grad(got, weight)
    assert slope.abs().max() > 0


@pytest.mark.parametrize("real,fake,spread,words", [
    ([.9, .6], [.6, .9], [.8, .7], None),
    ([1, .6], [.9, .9], [.8, .7], None),
    ([.9, .6], [.6, .9], [.8, .02], "varies at t = 2 "),
    ([.9, .6], [.6, .9], [.02, .8], None),
    ([.9, .6, .6], [.6, .9, .9], [.8, .8, .02], "varies at t = 3 "),
    ([.9, 1], [.6, 1], [.8, .7], "every fake one at t = 2,"),
    ([1, 1], [1, 1], [.8, .7], "t = 1, 2,")])
def test_collapse_and_a_discriminator_that_is_sure_are_named(real, fake, spread, words):
    T = len(spread)
    recon = (8.0, 0.0, 0.1)  # at t = 1 least squares decide
    told = ddgan.trouble(settings(T=T, recon=recon[:T]), real, fake, spread)
    assert told is None if words is None else words in told and "usually helps" in told


def test_minutes_that_end_before_the_gan_begins_are_told():
    c = settings(pretrain=2600, minutes=14.0)
    assert ddgan.too_short(c, 200 * 0.3, 200) is None  # 13 minutes of least squares
    told = ddgan.too_short(c, 200 * 0.6, 200)
    assert "--minutes 14 end before" in told and "2600 updates" in told and "26 minutes" in told
    assert ddgan.too_short(settings(pretrain=0, minutes=1.0), 1000, 200) is None
    assert ddgan.too_short(settings(pretrain=2600, minutes=0.0), 1000, 200) is None
