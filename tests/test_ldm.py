"""ldm.py's mathematics and its two stages; what all scripts share is in test_scripts.py.

Closed forms in float64, networks known exactly, and short runs on drawn digits.
"""
import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import conftest
import ddim
import ldm
from common import autoencoder, data, draws, flags, metrics, runs
from common.autoencoder import Autoencoder
from common.schedules import alpha_bar, timesteps
from conftest import SMALL, run
from kernels.diffuse import add_noise
from kernels.noise import randn
from test_ddpm import M, V, exact
from test_scripts import losses, same, weights


def settings(**changes):
    return conftest.settings(ldm, **changes)


class Says(nn.Module):
    """A network that says one thing, which can be learned."""

    def __init__(self, *shape, value=None):
        super().__init__()
        self.said = nn.Parameter(torch.zeros(shape) if value is None else torch.tensor(value))

    def forward(self, x):
        return self.said.expand(len(x), *self.said.shape[1:])


def vector_quantiser(c, z, codes):
    """An autoencoder whose encoder says z (1, channels, 1, 1), with these codes."""
    ae = autoencoder.build(c)
    ae.encoder = Says(value=z)
    ae.codes.data = torch.tensor(codes)
    return ae


# -------------------------------------------------------------------------------- the autoencoder
def test_gradients_of_a_quantised_latent_are_those_worked_out_by_hand():
    """The commitment's weight is on the term that moves the encoder, and gradients pass straight.

    With it on the codebook's term dz would be (-3.7, -2.2) and de0 (-.075, .05).
    """
    c = settings(latent="vq", codes=3, channels=2, shape=(1, 1, 1))
    ae = vector_quantiser(c, [[[[0.3]], [[-0.2]]]], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ae.decoder = nn.Conv2d(2, 1, 1, bias=False)
    ae.decoder.weight.data = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    loss, parts = ldm.autoencoder_loss(c, ae, torch.ones(1, 1, 1, 1), None)
    assert parts["index"].flatten().tolist() == [0]
    assert_close(loss.item(), 1.08125, rtol=0, atol=1e-6)
    loss.backward()
    assert_close(ae.encoder.said.grad.flatten(), torch.tensor([-3.925, -2.05]))
    assert_close(ae.codes.grad, torch.tensor([[-0.3, 0.2], [0, 0], [0, 0]]))


def test_the_kl_to_a_normal():
    """KL(N(.5, e^-2), N(0, 1)) = 0.692668, over a picture's latents, divided by its values."""
    c = settings(latent="kl", kl=1.0, channels=3, f=2, shape=(1, 4, 4))
    ae = autoencoder.build(c)
    ae.encoder = Says(value=[[[[m] * 2] * 2 for m in (0.5, 0.5, 0.5, -2.0, -2.0, -2.0)]])
    x, nu = torch.zeros(5, 1, 4, 4), torch.zeros(5, 3, 2, 2)
    loss, parts = ldm.autoencoder_loss(c, ae, x, nu)
    assert_close(parts["kl"].item(), 0.692668 * 12 / 16, rtol=0, atol=1e-6)
    assert_close(loss.item() - parts["mse"].item(), parts["kl"].item(), rtol=1e-5, atol=1e-6)


def test_a_plain_vae_minimises_the_negative_elbo():
    """--kl 1 --likelihood bernoulli, against torch.distributions."""
    c = settings(latent="kl", kl=1.0, likelihood="bernoulli", channels=2, width_ae=8,
                 shape=(1, 8, 8))
    ae = autoencoder.build(c)
    x, nu = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 2, 4, 4)
    loss, _ = ldm.autoencoder_loss(c, ae, x, nu)
    mean, logvar = ae.encode(x)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    z = mean + (logvar / 2).exp() * nu
    level = (x + 1) / 2
    p = torch.distributions.Bernoulli(logits=ae.decoder(z))
    log_p = level * p.log_prob(torch.ones_like(x)) + (1 - level) * p.log_prob(torch.zeros_like(x))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    assert_close(loss, (kl.sum() - log_p.sum()) / x.numel())
    assert_close(ae.decode(z), 2 * p.probs - 1, atol=1e-6, rtol=1e-5)


def test_a_linear_vae_of_normal_data_has_its_known_minimum():
    """x ~ N(0, 1), weight beta .02: posterior variance .01, MSE .01, loss .056052; a minimum."""
    beta, n = 0.02, 400_000
    c = settings(latent="kl", kl=beta, channels=1, shape=(1, 1, 1))
    x, nu = torch.randn(2, n, 1, 1, 1, generator=torch.Generator().manual_seed(0)).unbind()
    x, nu = x / x.square().mean().sqrt(), nu / nu.square().mean().sqrt()
    nu = nu - (nu * x).mean() * x

    class Linear(Autoencoder):
        def encode(self, x):
            return self.a * x, self.logvar.expand(x.shape)

    ae = Linear(1, 1, 2, width=4)
    ae.decoder = nn.Conv2d(1, 1, 1, bias=False)
    v = beta / 2
    best = dict(a=math.sqrt(1 - v), logvar=math.log(v), b=math.sqrt(1 - v))

    def loss(**changes):
        worth = best | changes
        ae.a, ae.logvar = worth["a"], torch.tensor(worth["logvar"])
        ae.decoder.weight.data.fill_(worth["b"])
        total, parts = ldm.autoencoder_loss(c, ae, x, nu)
        return total.item(), parts["mse"].item()

    assert_close(loss()[0], 0.056052, rtol=0, atol=2e-4)
    assert_close(loss()[1], 0.01, rtol=0, atol=2e-4)
    for name, value in best.items():
        for by in (-0.1, 0.1):
            assert loss(**{name: value + by})[0] > loss()[0] + 1e-6, (name, by)


def test_the_nearest_of_even_codes():
    """U(0, 1) by 16 codes in the middle of their parts: mean square 1 / (12 * 16^2)."""
    ae = Autoencoder(1, 1, 2, codes=16, width=4)
    ae.codes.data = (torch.arange(16.0)[:, None] + 0.5) / 16
    z = ((torch.arange(64_000.0) + 0.5) / 64_000).view(10, 1, 80, 80)
    e, index = ae.quantise(z)
    assert_close((e - z).square().mean().item(), 3.2552e-4, rtol=1e-4, atol=0)
    assert (index == (z[:, 0] * 16).long()).float().mean() > 0.999
    assert e.shape == z.shape and index.shape == (10, 80, 80)


@pytest.mark.parametrize("f", [2, 4, 8])
@pytest.mark.parametrize("latent", ["kl", "vq"])
def test_shapes(latent, f):
    c = settings(latent=latent, f=f, channels=3, width_ae=8, shape=(3, 16, 16))
    ae = autoencoder.build(c)
    mean, logvar = ae.encode(torch.zeros(2, 3, 16, 16))
    assert mean.shape == (2, 3, 16 // f, 16 // f) == (2, *ldm.latent_shape(c))
    assert (logvar is None) == (latent == "vq")
    assert ae.decode(mean).shape == (2, 3, 16, 16)
    net = ldm.network(c)
    assert net(mean, torch.zeros(2)).shape == mean.shape
    assert not any(p.requires_grad for p in net.autoencoder.parameters())
    assert all(p.requires_grad for p in net.net.parameters())


def digits(**changes):
    """The drawn digits, 8 x 8."""
    return data.load("digits", changes.pop("root"), 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a KL model and a VQ model of digits, each trained for seconds."""
    folder = tmp_path_factory.mktemp("ldm")
    for latent, more in (("kl", []), ("vq", ["--latent", "vq", "--codes", 32])):
        run(folder, "ldm", "--train", "--iters", 230, *SMALL["ldm"], *more, "--run", latent)
    return folder


def enlarged(saved, by, channels):
    """A checkpoint of stage 1 whose latents are `by` times as large, and its pictures are not."""
    saved = copy.deepcopy(saved)
    for part in (saved["autoencoder"], saved["ema"]["net"]):
        last = max(int(name.split(".")[1]) for name in part if name.startswith("encoder."))
        for name in (f"encoder.{last}.weight", f"encoder.{last}.bias"):
            part[name][:channels] *= by
        part["decoder.0.weight"] /= by
        if "codes" in part:
            part["codes"] *= by
    return saved


@pytest.mark.parametrize("by", [8, 3])
def test_how_large_latents_are_changes_nothing(place, by):
    """Eight times as large: not a bit of training and samples; three times: rounding.

    By codes, since a draw of KL's posterior has noise that would have to grow too.
    """
    large = place / f"large-{by}" / "autoencoder"
    large.mkdir(parents=True)
    torch.save(enlarged(weights(place / "vq" / "autoencoder"), by, 3), large / "checkpoint.pt")
    (place / "as-it-is").mkdir(exist_ok=True)
    shutil.copytree(place / "vq" / "autoencoder", place / "as-it-is" / "autoencoder",
                    dirs_exist_ok=True)
    for source in ("as-it-is", f"large-{by}"):
        run(place, "ldm", "--train", "--iters", 5, "--autoencoder", source, *SMALL["ldm"][:-6],
            "--run", f"of-{source}", "--fresh")
        run(place, "ldm", "--sample", "--run", f"of-{source}", "--n", 4, "--steps", 5, "--out",
            f"of-{source}.npz")
    one, two = weights(place / "of-as-it-is"), weights(place / f"of-large-{by}")
    std = "autoencoder.std"
    assert_close(two["net"][std], by * one["net"][std], rtol=0 if by == 8 else 1e-6, atol=0)
    exact = dict(rtol=0, atol=0) if by == 8 else dict(rtol=1e-3, atol=1e-5)
    for name, value in one["net"].items():
        if name.startswith("net."):
            assert_close(two["net"][name], value, **exact)
    with np.load(place / "of-as-it-is.npz") as a, np.load(place / f"of-large-{by}.npz") as b:
        off = np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int))
        assert off.max() <= (0 if by == 8 else 1)


def test_the_scale_is_that_of_draws_from_the_posterior(place):
    """2,000 pictures: mean and std of each channel, also after a resume, and in what samples."""
    c, net = ldm.load(place / "kl" / "checkpoint.pt", device="cpu", precision="fp32")
    set_ = digits(root=place / "data")
    x = set_.batch(metrics.choice(len(set_), 2000))[0]
    nu = torch.randn(len(x), *ldm.latent_shape(c), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = net.autoencoder.drawn(net.autoencoder.encoder(x), nu).double()
    assert_close(net.autoencoder.mean.double(), z.mean((0, 2, 3)), atol=0.01, rtol=0)
    assert_close(net.autoencoder.std.double(), z.std((0, 2, 3)), atol=0, rtol=0.01)
    again = net.autoencoder.unscaled(net.autoencoder.scaled(z.float()))
    assert_close(again.double(), z, atol=1e-5, rtol=1e-5)
    saved = weights(place / "kl")
    for part in (saved["net"], saved["ema"]["net"]):
        assert torch.equal(part["autoencoder.mean"], net.autoencoder.mean)
        assert torch.equal(part["autoencoder.std"], net.autoencoder.std)
        assert (part["autoencoder.std"] != 1).all()


@pytest.mark.parametrize("latent", ["kl", "vq"])
def test_pictures_survive_the_way_through_the_latents(place, latent):
    c, net = ldm.load(place / latent / "checkpoint.pt", device="cpu", precision="fp32")
    x = digits(root=place / "data").batch(torch.arange(200))[0]
    error = (ldm.reconstructed(c, net.autoencoder, x) - x).square().mean()
    assert error < 0.15 * x.var(), error / x.var()
    if latent == "kl":  # latents that are a little wrong are pictures too
        z = ldm.encoded(c, net.autoencoder, x)
        wrong = z + 0.1 * net.autoencoder.std.view(-1, 1, 1) * torch.randn_like(z)
        off = ldm.decoded(c, net.autoencoder, wrong) - ldm.decoded(c, net.autoencoder, z)
        assert off.square().mean() < 0.05 * x.var()


@pytest.mark.parametrize("latent", ["kl", "vq"])
def test_latents_that_are_kept_are_those_of_each_update(place, monkeypatch, latent):
    """Mirrored ones too: where they would take too much memory, the losses are the same."""
    asked, encode_all = [], ldm.encode_all

    def noted(c, ae, data):
        c = copy.copy(c)
        c.iters = 100_000  # for ten updates alone they are not worth it
        asked.append(encode_all(c, ae, data))
        return asked[-1]
    monkeypatch.setattr(ldm, "encode_all", noted)
    given = ["--train", "--iters", 20, "--flip", "--autoencoder", latent, *SMALL["ldm"][:-6]]
    run(place, "ldm", *given, "--run", f"kept-{latent}")
    monkeypatch.setattr(autoencoder, "KEPT", 1000)
    run(place, "ldm", *given, "--run", f"each-{latent}")
    assert len(asked[0]) == 2 * len(digits(root=place / "data")) and asked[1] is None
    assert_close(losses(place / f"kept-{latent}"), losses(place / f"each-{latent}"), rtol=1e-5,
                 atol=1e-6)


def test_chunks_are_decoded_as_the_whole(place, monkeypatch):
    c, net = ldm.load(place / "kl" / "checkpoint.pt", device="cpu", precision="fp32")
    z, x = torch.randn(7, *ldm.latent_shape(c)), torch.randn(7, 1, 8, 8)
    want, latents = net.autoencoder.decode(z), net.autoencoder.encode(x)[0]
    sizes = []
    monkeypatch.setattr(autoencoder, "CHUNK", 3 * 64)
    net.autoencoder.decoder.register_forward_hook(lambda net, given, out: sizes.append(len(out)))
    assert_close(ldm.decoded(c, net.autoencoder, z), want, atol=1e-5, rtol=1e-5)
    assert_close(ldm.encoded(c, net.autoencoder, x), latents, atol=1e-5, rtol=1e-5)
    assert sizes == [3, 3, 1]


# ------------------------------------------------------------------------------------- codes of VQ
def test_dead_codes_move_to_latents_of_chosen_pictures(place):
    """The same ones in every process and every run; those in use stay; both copies get them."""
    c = settings(latent="vq", codes=32, channels=3, width_ae=8, shape=(1, 8, 8))
    set_ = digits(root=place / "data")
    ae = autoencoder.build(c)
    ema = runs.EMA(ae, 0.9)
    ae.used += 1
    dead = torch.arange(32) % 3 == 0
    before, found = ae.codes.detach().clone(), []
    for step in (100, 100, 200):
        ldm.revive(c, ae, ema, set_, step, dead)
        found.append(ae.codes.detach().clone())
        assert torch.equal(ema.net.codes[dead], ae.codes[dead]) and ae.used.sum() == 0
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[0][~dead], before[~dead])
    everywhere = ldm.encoded(c, ae, set_.batch(torch.arange(len(set_)))[0])
    everywhere = everywhere.movedim(1, -1).flatten(0, 2)
    nearest = torch.cdist(found[0][dead], everywhere,  # by products it errs by 3e-4
                          compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert nearest.max() < 1e-4


def test_used_codes_and_perplexity_are_told(place):
    table = np.genfromtxt(place / "vq" / "autoencoder" / "metrics.csv", delimiter=",", names=True)
    assert {"codes", "perplexity", "mse", "loss"} <= {*table.dtype.names}
    assert (table["perplexity"] <= table["codes"] + 1e-3).all() and table["codes"].max() <= 32
    assert table["codes"][-1] > 8
    ae = Autoencoder(1, 2, 2, codes=8, width=4)
    told = ldm.use(ae, torch.tensor([[[0, 0], [1, 1]], [[2, 2], [3, 3]]]))
    assert told["codes"] == 4 and abs(told["perplexity"] - 4) < 1e-5
    ldm.use(ae, torch.zeros(1, 2, 2, dtype=torch.long))
    assert ae.used.tolist() == [6, 2, 2, 2, 0, 0, 0, 0]


def test_the_diffusion_of_vq_sees_latents_before_their_codes(place, monkeypatch):
    c, net = ldm.load(place / "vq" / "checkpoint.pt", device="cpu", precision="fp32")
    ae, set_ = net.autoencoder, digits(root=place / "data")
    x = set_.batch(torch.arange(30))[0]
    z = ldm.encoded(c, ae, x)
    e, _ = ae.quantise(z)
    assert (z - e).abs().max() > 1e-3
    assert_close(ae.decode(z), ae.finished(ae.decoder(e)))
    seen = []  # by an update of training, and by one that keeps no latents
    monkeypatch.setattr(ldm, "add_noise", lambda z0, *more: seen.append(z0) or add_noise(z0, *more))
    for latents in (ldm.encode_all, lambda *given: None):
        monkeypatch.setattr(ldm, "encode_all", latents)
        run(place, "ldm", "--train", "--iters", 1, "--autoencoder", "vq", *SMALL["ldm"][:-6],
            "--run", "seen", "--fresh")
    first = draws.batch_index(len(set_), 16, 0, 1)
    z = ae.scaled(ldm.encoded(c, ae, set_.batch(first)[0]))
    for z0 in seen:
        assert_close(z0, z, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ the diffusion
class Known(nn.Module):
    """The best network for latents that are N(M, V), with an autoencoder that changes nothing."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.autoencoder = autoencoder.build(c)
        self.autoencoder.decode = lambda z: z

    def forward(self, z, time, label=None):
        t = (time.double() * self.c.T).round().long()
        return exact(self.c, z.double(), t).float()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_the_sampler_in_float64(eta, predict):
    """DDIM's equation 12, never clipped: what it meets here is far outside [-1, 1] on the way."""
    steps, n = 13, 4
    c = settings(T=100, schedule="linear", predict=predict, eta=eta, channels=2, shape=(1, 6, 6))
    net = Known(c)
    net.autoencoder.mean += 5.0
    net.autoencoder.std *= 3.0
    z = randn((n, 2, 3, 3), c.seed, 0, stream=draws.START).double()
    ab, tau = alpha_bar(c.schedule, c.T), timesteps(c.T, steps).tolist()
    for i in range(steps - 1, -1, -1):
        t, s = tau[i], tau[i - 1] if i else 0
        sigma = eta * ((1 - ab[s]) / (1 - ab[t])).sqrt() * (1 - ab[t] / ab[s]).sqrt()
        eps = exact(c, z, torch.full((n,), t), "eps")
        z0 = (z - (1 - ab[t]).sqrt() * eps) / ab[t].sqrt()
        fresh = randn((n, 2, 3, 3), c.seed, 0, t, draws.STEP).double()
        z = ab[s].sqrt() * z0 + (1 - ab[s] - sigma ** 2).clamp(min=0).sqrt() * eps + sigma * fresh
    frames = []
    got = ldm.sample(c, net, 0, n, steps, frames=frames)
    assert_close(got.double(), 3 * z + 5, atol=1e-4, rtol=1e-4)
    assert len(frames) == steps and frames[0].shape == got.shape
    assert_close(frames[-1], got, atol=1e-5, rtol=1e-5)  # the last step adds nothing


def test_large_latents_are_not_clipped():
    c = settings(T=100, predict="eps", channels=2, shape=(1, 6, 6))
    net = Known(c)
    # it sees no noise: z0' = z / signal
    net.forward = lambda z, time, label=None: torch.zeros_like(z)
    assert ldm.sample(c, net, 0, 4, 7).abs().max() > 50


def test_the_steps_are_those_of_ddim():
    for eta in (0.0, 0.3, 1.0):
        of_ldm = settings(eta=eta, predict="v")
        of_ddim = conftest.settings(ddim, eta=eta, predict="v")
        tau = timesteps(1000, 21)
        assert torch.equal(ldm.walk(of_ldm, tau), ddim.walk(of_ddim, tau))


def test_objective():
    z0, eps, out = torch.randn(3, 2, 4, 3, 3).unbind()
    signal, noise = torch.tensor([[0.6, 0.8], [0.8, 0.6]]).view(2, 2, 1, 1, 1).unbind()
    for predict, target in (("eps", eps), ("v", signal * eps - noise * z0)):
        c = settings(predict=predict)
        got = ldm.objective(c, out, z0, eps, signal, noise)
        assert_close(got, (out - target).square().mean())


# ---------------------------------------------------------------------------------- the two stages
def test_both_stages_leave_their_files(place):
    for latent in ("kl", "vq"):
        for folder in (place / latent, place / latent / "autoencoder"):
            there = {p.name for p in folder.iterdir()}
            assert {"checkpoint.pt", "config.json", "metrics.csv", "loss.png", "script.py"} <= there
        assert (place / latent / "samples.png").exists()
        loss = losses(place / latent)
        assert loss[-5:].mean() < 0.92 * loss[0]
        table = np.genfromtxt(place / latent / "autoencoder" / "metrics.csv", delimiter=",",
                              names=True)
        assert table["mse"][-3:].mean() < 0.3 * table["mse"][0]


def test_more_updates_leave_the_autoencoder_alone(place):
    """Stage 1 is closed: not a bit of it moves, in its folder or in the model; the rest goes on."""
    run(place, "ldm", "--train", "--iters", 20, *SMALL["ldm"], "--run", "more")
    one, first = weights(place / "more"), weights(place / "more" / "autoencoder")
    before = (place / "more" / "autoencoder" / "checkpoint.pt").read_bytes()
    done = run(place, "ldm", "--train", "--iters", 40, *SMALL["ldm"], "--run", "more")
    assert "autoencoder" not in done.stderr
    assert (place / "more" / "autoencoder" / "checkpoint.pt").read_bytes() == before
    two = weights(place / "more")
    assert two["step"] == 40 and first["step"] == 20
    for name, value in one["net"].items():
        if name.startswith("autoencoder."):
            assert torch.equal(two["net"][name], value)
            assert torch.equal(two["ema"]["net"][name], value), name
            if name.removeprefix("autoencoder.") not in ("mean", "std"):
                assert torch.equal(first["ema"]["net"][name.removeprefix("autoencoder.")], value)
    moved = [name for name, value in one["net"].items() if not torch.equal(two["net"][name], value)]
    assert moved and all(name.startswith("net.") for name in moved)
    # a run that never stopped at 20 has another autoencoder, since that trained for longer
    done = run(place, "ldm", "--train", "--iters", 30, *SMALL["ldm"], "--run", "more", "--fresh")
    assert weights(place / "more")["step"] == 30
    assert weights(place / "more" / "autoencoder")["step"] == 30
    assert not same(weights(place / "more")["net"]["autoencoder.mean"],
                    one["net"]["autoencoder.mean"])


def test_fresh_ends_the_old_model_before_the_new_one_is_there(place, monkeypatch):
    """Stopped in stage 1 of --fresh, the next start goes on with that, not with the old stage 2."""
    run(place, "ldm", "--train", "--iters", 20, *SMALL["ldm"], "--run", "anew")

    def stopped(*given):
        raise SystemExit(130)
    with monkeypatch.context() as patched:
        patched.setattr(ldm, "autoencoder_loss", stopped)  # in the first update of stage 1
        run(place, "ldm", "--train", "--iters", 10, *SMALL["ldm"], "--run", "anew", "--fresh",
            code=130)
    assert not (place / "anew" / "checkpoint.pt").exists()
    run(place, "ldm", "--train", "--iters", 30, *SMALL["ldm"], "--run", "anew")
    assert weights(place / "anew" / "autoencoder")["step"] == 30


def test_stage_1_resumed_equals_never_stopped(place):
    """With codes, which are counted and revived at 100 and 200 updates, between two starts."""
    given = ["--train", *SMALL["ldm"], "--latent", "vq", "--codes", 32, "--run", "twice"]
    stop = pytest.MonkeyPatch()
    stop.setattr(ldm, "train_diffusion", lambda *given: (_ for _ in ()).throw(SystemExit(130)))
    run(place, "ldm", *given, "--iters", 150, code=130)
    stop.undo()
    run(place, "ldm", *given, "--iters", 230)
    for folder in ("autoencoder", "."):
        one, two = weights(place / "vq" / folder), weights(place / "twice" / folder)
        for part in one.keys() & {"autoencoder", "net", "ema", "optimizer"}:
            assert same(one[part], two[part]), (folder, part)
        assert losses(place / "vq" / folder).tolist() == losses(place / "twice" / folder).tolist()


def test_several_models_share_an_autoencoder(place):
    done = run(place, "ldm", "--train", "--iters", 10, *SMALL["ldm"][:-6], "--autoencoder", "vq",
               "--run", "shared", "--conditional")
    assert not (place / "shared" / "autoencoder").exists() and "8 x 8" in done.stderr
    one, two = weights(place / "vq")["net"], weights(place / "shared")
    for name, value in one.items():
        if name.startswith("autoencoder."):
            assert torch.equal(two["net"][name], value), name
    assert two["config"]["latent"] == "vq" and two["config"]["codes"] == 32
    again = ["--train", "--iters", 12, *SMALL["ldm"][:-6], "--autoencoder", "vq", "--run", "shared",
             "--conditional"]
    run(place, "ldm", *again)
    assert weights(place / "shared")["step"] == 12
    run(place, "ldm", "--sample", "--run", "shared", "--n", 3, "--steps", 3, "--label", "7",
        "--guidance", 2, "--out", "seven.npz")
    with np.load(place / "seven.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1) and (arrays["arr_1"] == 7).all()
    for more, words in ((["--f", 4], "--f does nothing with --autoencoder"),
                        (["--latent", "kl"], "--latent kl is not what --autoencoder has, vq"),
                        (["--autoencoder", "wrong"], "is the run itself"),
                        (["--share", 0.5], "--share does nothing with --autoencoder"),
                        (["--init", "kl/checkpoint.pt"], "leave out --autoencoder"),
                        (["--multipliers", "1,2,2,2"], "need at least 8 x 8"),
                        (["--size", 16], "was trained on pictures of shape (1, 8, 8)"),
                        (["--autoencoder", "nowhere"], "--autoencoder nowhere is not a run")):
        done = run(place, "ldm", *again, *more, "--run", "wrong", code=2)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (place / "wrong").exists()


def test_minutes_are_shared_by_the_stages(place, monkeypatch):
    limits = []
    begin = runs.Run.__init__

    def noted(self, c, data, share=1.0, **more):
        begin(self, c, data, share, **more)
        limits.append(self.limit / 60)
        self.limit = 0.0
    monkeypatch.setattr(runs.Run, "__init__", noted)
    run(place, "ldm", "--train", "--minutes", 10, "--share", 0.2, *SMALL["ldm"], "--run", "limits",
        code=2)  # nothing was trained, so there is nothing to draw with
    assert_close(limits, [2.0, 8.0])


# ------------------------------------------------------------------- encode, interpolate, the prior
def test_pictures_are_encoded_into_latents_and_a_sheet(place):
    pixels = digits(root=place / "data").images[0, 0].numpy()
    Image.fromarray(pixels).save(place / "mine.png")
    done = run(place, "ldm", "--encode", "mine.png", "--run", "vq", "--out", "mine.npz")
    assert "1 pictures, 64 values in 48 latents" in done.stdout
    c, net = ldm.load(place / "vq" / "checkpoint.pt", device="cpu", precision="fp32")
    x = torch.from_numpy(pixels.copy()).view(1, 1, 8, 8).float() / 127.5 - 1
    with np.load(place / "mine.npz") as arrays:
        latents, again = torch.from_numpy(arrays["latents"]), arrays["pictures"]
        assert_close(latents, net.autoencoder.scaled(ldm.encoded(c, net.autoencoder, x)))
        assert again.shape == (1, 8, 8, 1) and again.dtype == np.uint8
        assert arrays["codes"].shape == (1, 4, 4) and 0 <= arrays["codes"].min()
        assert np.abs(again[0, :, :, 0].astype(int) - pixels).mean() < 30
    run(place, "ldm", "--encode", "--run", "kl")
    sheet = np.asarray(Image.open(place / "kl" / "encode.png"))
    assert sheet.ndim == 2 and sheet.shape[1] > 3.5 * sheet.shape[0]  # two rows of eight
    for more, words in ((["--out", "x.gif"], "writes a .png or an .npz"),
                        (["no.png"], "no.png is not there"),
                        (["--n", 3], "--n does nothing with --encode")):
        done = run(place, "ldm", "--sample", "--run", "kl", "--encode", *more, code=2)
        assert words in done.stderr and done.stderr.count("\n") == 1


def test_interpolation_begins_with_the_samples_themselves(place):
    run(place, "ldm", "--interpolate", "--run", "kl", "--n", 2, "--steps", 4, "--out", "walk.npz")
    run(place, "ldm", "--sample", "--run", "kl", "--n", 3, "--steps", 4, "--out", "ends.npz")
    with np.load(place / "walk.npz") as walk, np.load(place / "ends.npz") as ends:
        rows = walk["arr_0"].astype(int).reshape(2, 11, 8, 8)
        ends = ends["arr_0"].astype(int)[..., 0]
    for i in (0, 1):
        assert np.abs(rows[i, 0] - ends[i]).max() <= 1
        assert np.abs(rows[i, 10] - ends[i + 1]).max() <= 1
        assert np.abs(rows[i, 5] - ends[i]).mean() > 3


def test_the_prior_of_a_vae_is_decoded(place):
    """--prior: z ~ N(0, 1) as it is, not scaled; it is the same whatever --n, and can be judged."""
    done = run(place, "ldm", "--sample", "--prior", "--run", "kl", "--n", 3, "--out", "prior.npz")
    assert "3 samples in" in done.stdout and "0 network evaluations" in done.stdout
    c, net = ldm.load(place / "kl" / "checkpoint.pt", device="cpu", precision="fp32")
    z = randn((3, *ldm.latent_shape(c)), 0, 0, stream=draws.START)
    want = net.autoencoder.decode(z).add(1).mul(127.5).round().clamp(0, 255)
    with np.load(place / "prior.npz") as arrays:
        got = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).float()
    assert ((got - want).abs() <= 1).all()
    for given, words in ((["--run", "vq", "--prior"], "codes have no prior"),
                         (["--run", "kl", "--prior", "--steps", 3], "--steps does nothing with")):
        done = run(place, "ldm", "--sample", *given, code=2)
        assert words in done.stderr and done.stderr.count("\n") == 1


def test_stage_1_alone_cannot_be_sampled_from(place):
    for given in (["--checkpoint", "kl/autoencoder/checkpoint.pt"], ["--run", "kl/autoencoder"]):
        done = run(place, "ldm", "--sample", *given, code=2)
        assert "is of stage 1, an autoencoder alone" in done.stderr
        assert done.stderr.count("\n") == 1
    before = (place / "kl" / "autoencoder" / "checkpoint.pt").read_bytes()
    done = run(place, "ldm", "--train", "--iters", 5, *SMALL["ldm"], "--run", "kl/autoencoder",
               code=2)
    assert done.stderr.count("\n") == 1 and "stage 1" in done.stderr
    assert (place / "kl" / "autoencoder" / "checkpoint.pt").read_bytes() == before


def test_a_side_that_f_does_not_divide(place):
    done = run(place, "ldm", "--train", "--iters", 5, *SMALL["ldm"], "--f", 8, "--size", 12,
               "--run", "odd", code=2)
    assert "--f 8 does not divide the pictures' side of 12: give --size 8" in done.stderr
    assert done.stderr.count("\n") == 1 and not (place / "odd").exists()


def test_the_bits_of_a_flag_are_taken_from_a_file_with_care(place):
    saved = weights(place / "vq" / "autoencoder")
    saved["config"]["f"] = 3
    (place / "bad" / "autoencoder").mkdir(parents=True)
    torch.save(saved, place / "bad" / "autoencoder" / "checkpoint.pt")
    done = run(place, "ldm", "--train", "--iters", 5, "--size", 8, "--autoencoder", "bad", "--run",
               "wrong", code=2)
    assert "is damaged: f = 3" in done.stderr and done.stderr.count("\n") == 1
    assert flags.checked(settings().fields["f"], 4, "x") == 4


def test_fine_tuning_keeps_the_autoencoder_of_the_file(place):
    """--init has both stages; what would change its decoder, or the minutes, is refused."""
    run(place, "ldm", "--train", "--iters", 3, "--init", "kl/checkpoint.pt", "--run", "tuned")
    one, two = weights(place / "kl"), weights(place / "tuned")
    for name, value in one["ema"]["net"].items():
        if name.startswith("autoencoder."):
            assert torch.equal(two["net"][name], value), name
    assert not (place / "tuned" / "autoencoder").exists()
    for more, words in ((["--likelihood", "bernoulli"], "leave out --likelihood"),
                        (["--kl", 1], "leave out --kl"), (["--share", 0.5], "leave out --share"),
                        (["--init", "kl/autoencoder/checkpoint.pt"], "is of stage 1")):
        done = run(place, "ldm", "--train", "--minutes", 1, "--init", "kl/checkpoint.pt", *more,
                   "--run", "wrong", code=2)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    # a run without a first stage of its own lends its model's
    run(place, "ldm", "--train", "--iters", 2, "--autoencoder", "tuned", *SMALL["ldm"][:-6],
        "--run", "lent")
    assert same(weights(place / "lent")["net"]["autoencoder.encoder.0.weight"],
                one["net"]["autoencoder.encoder.0.weight"])


def test_stage_2_may_change_while_only_stage_1_is_trained(place, monkeypatch, tmp_path):
    """The script's text, and flags that stage 1 does not read."""
    given = ["--train", "--iters", 10, *SMALL["ldm"], "--run", "between"]

    def stopped(*given):
        raise SystemExit(130)
    with monkeypatch.context() as patched:
        patched.setattr(ldm, "train_diffusion", stopped)
        run(place, "ldm", *given, code=130)
    saved = weights(place / "between" / "autoencoder")
    saved["script"] = saved["script"].replace("COMMITMENT = 0.25", "COMMITMENT = 0.5")
    torch.save(saved, place / "between" / "autoencoder" / "checkpoint.pt")
    done = run(place, "ldm", *given, "--predict", "eps")
    assert "ldm.py has changed since between/autoencoder was trained" in done.stderr
    assert weights(place / "between")["step"] == 10


def test_noise_can_be_predicted_without_clipping():
    """At the cosine's end x0' would be 20,000 times the network's error; hence another schedule."""
    assert settings(predict="eps").schedule == "linear" and settings().schedule == "cosine"
    c = settings(predict="eps", channels=2, shape=(1, 6, 6))
    net = Known(c)
    exactly = net.forward
    generator = torch.Generator().manual_seed(0)

    def nearly(z, time, label=None):
        out = exactly(z, time, label)
        return out + 0.01 * torch.randn(out.shape, generator=generator)
    net.forward = nearly
    z = ldm.sample(c, net, 0, 200, 50)
    assert abs(z.std() / math.sqrt(V) - 1) < 0.25 and abs(z.mean() - M) < 0.05


def test_reconstructions_are_judged(place):
    """Error and FCD of held-out pictures; of one picture there is no distance."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(metrics.UPDATES, 1, 150)
    run(place, "ldm", "--evaluate", "--run", "kl", "--n", 100, "--steps", 2)
    found = json.loads((place / "kl" / "evaluation.json").read_text())
    c, net = ldm.load(place / "kl" / "checkpoint.pt", device="cpu", precision="fp32")
    test = data.load("digits", place / "data", 8, split="test")
    x = test.batch(metrics.choice(len(test), 1000))[0]
    again = ldm.reconstructed(c, net.autoencoder, x)
    assert_close(found["reconstruction error"], (again - x).square().mean().item(), rtol=1e-4,
                 atol=0)
    c.data_root = str(place / "data")
    kept = metrics.fcd(c, test.images[metrics.choice(len(test), 1000)])
    worse = metrics.fcd(c, again.mul(0.7).add(1).mul(127.5).round().clamp(0, 255).byte())
    assert kept < found["reconstructions' FCD"] < worse
    assert metrics.fcd(c, test.images[:1]) is None
    monkeypatch.undo()
