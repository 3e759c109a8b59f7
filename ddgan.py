"""DDGAN: denoising diffusion GAN. Xiao, Kreis, Vahdat 2021 (arXiv:2112.07804), "Tackling the generative learning trilemma".

    python ddgan.py --train                         # digits, drawn on the spot
    python ddgan.py --sample --n 100                # T = 4 network evaluations each
    python ddgan.py --evaluate                      # FCD, precision, recall, ..., modes
    python ddgan.py --train --data gaussians        # 2-D; with --T 1 --run DIR the plain GAN beside it
    python ddgan.py --train --data cifar10          # the paper's recipe, for a GPU

Digits on two cores of a Xeon without a GPU: 14 minutes of training, FCD 0.89 to 1.00 (floor 0.16), recall 0.94 to 0.95, three runs. The
25 Gaussians: all of them, 96 % of the points within 3 sigma, 8 minutes. What did it, by trial and with the failures, is in the README.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import metrics, pictures, runs
from common.runs import NOISE, START, STEP, option
from common.schedules import alpha_bar, posterior
from common.unet import Discriminator, PointsGenerator, UNet, spread_of_fours
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================================ Config
@dataclass
class Config:
    """This script's own flags; common/runs.py has the shared ones, and RECIPES what a data set changes."""
    T: int = option(4, "steps from data to noise, each a network evaluation; 1: a plain GAN, of pictures without --pretrain and with other "
                    "rates", low=1, high=8)
    z: int = option(100, "size of the generator's latent; 0: none, x_t alone decides", low=0)
    fake: str = option("posterior", "how x_{t-1} comes from the generator: posterior, of q(x_{t-1} | x_t, x0'); renoise, x0' noised "
                       "anew; direct, as it is", choices=("posterior", "renoise", "direct"), needs="T")
    gan_loss: str = option("softplus", "of the logits, Goodfellow's that does not saturate; bce: the same by sigmoid, then log",
                           choices=("softplus", "bce"))
    r1: float = option(1.0, "weight gamma of the penalty gamma/2 |grad D|^2 by the real x_{t-1}", low=0)
    r1_every: int = option(4, "updates from penalty to penalty", low=1, needs="r1")
    conditional: bool = option(False, "both networks learn class labels too")
    steps: int = option(0, "network evaluations, which is T and nothing else", "sample evaluate", low=1)
    label: int = option(-1, "draw only this class; default each in turn", "sample", low=0)

    width: int = option(64, "channels of the generator at full resolution", low=1)
    multipliers: tuple = option((1, 2, 2), "of the width, one for each level of the U-Net", low=1)
    blocks: int = option(1, "residual blocks a level", low=1)
    attention: tuple = option((16, 8), "sides of the maps that attend, where there are such; none: ''", low=1)
    heads: int = option(4, "attention heads", low=1, needs="attention")
    resample: str = option("conv", "between levels", choices=("conv", "biggan"))
    width_d: int = option(64, "channels of the discriminator at half resolution, where it begins", low=2)

    iters: int = option(100_000, "updates in all, each of both networks", low=1)
    minutes: float = option(0.0, "minutes of training in all; 0: no limit", low=0)
    t_weights: tuple = option((3, 11, 1, 1), "shares of the batch that t = 1..T have; equal with '', and by default for another T", low=1,
                             needs="T")
    pretrain: int = option(2_600, "first updates, in which G learns by alpha_bar_t |x0' - x0|^2 alone; D learns only in the last 300 of them", low=0)
    pretrain_z: int = option(600, "last of these updates, in which G tries four latents and learns with the one that comes nearest to x0; "
                             "by default at most a quarter of them", low=0, needs="pretrain z")
    pretrain_t_weights: tuple = option((7, 7, 1, 1), "shares of t in these updates; equal with '', and by default for another T", low=1,
                                      needs="pretrain T")
    lr_pretrain: float = option(2e-3, "the generator's learning rate in these updates", above=0, needs="pretrain")
    recon: tuple = option((8.0, 0.0, 5.0, 5.0), "weights at t = 1..T of the mean square of x0' - x0 beside the GAN's loss; none with '', and by "
                          "default for another T", low=0, part=float)
    batch: int = option(64, "pictures in an update", low=4)
    lr: float = option(3e-4, "learning rate of the generator's Adam", above=0)
    lr_d: float = option(1.4e-3, "learning rate of the discriminator's Adam", above=0)
    decay: int = option(0, "updates over which both rates fall to 1e-5, along a cosine; 0: constant", low=0)
    ema: float = option(0.999, "decay of the mean of the weights that samples are drawn with", low=0, high=0.999999)
    flip: bool = option(False, "mirror half of the pictures")


GAN_ALONE = dict(pretrain=0, t_weights=(), recon=())  # as the paper trains: no least squares, each t as often
PAPER = GAN_ALONE | dict(resample="biggan", multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), r1_every=10, flip=True,
                         width_d=128)  # appendix C, but for D, which is ours and begins at half resolution
RECIPES = {  # what differs from Config, by data set; `pictures` is any path
    **dict.fromkeys(("digits", "stacked"), dict(width=32, attention=(), decay=7_000, iters=7_000, minutes=14)),
    **dict.fromkeys(("swirl", "gaussians"), GAN_ALONE | dict(
        z=16, width=128, width_d=128, batch=512, lr=2e-3, lr_d=2e-3, r1=0.05, r1_every=1, decay=30_000, iters=30_000)),
    **dict.fromkeys(("mnist", "fashion-mnist"), dict(multipliers=(1, 2, 2, 2), decay=40_000, iters=40_000)),
    "cifar10": PAPER | dict(width=128, multipliers=(1, 2, 2, 2), batch=256, lr=1.6e-4, lr_d=1.25e-4, r1=0.02, r1_every=15,
                            decay=350_000, iters=350_000, ema=0.9999),
    "celeba-hq": PAPER | dict(T=2, size=256, batch=32, lr=2e-4, lr_d=1e-4, r1=2, decay=750_000, iters=750_000),  # a folder of this name
    "lsun": PAPER | dict(size=256, lr=1.6e-4, lr_d=1e-4, decay=985_000, iters=985_000),
    "pictures": dict(decay=100_000, flip=True),
}
PLAIN = dict(pretrain=0, lr=2e-4, lr_d=2e-4)  # with --T 1, in Config's place: of pure noise least squares learn the mean picture
DIRECT = dict(pretrain=0, recon=())  # with --fake direct: of x_s too, most of which is noise at large t

# ========================================================================================================== Notation
# x0 (B, C, H, W) data in [-1, 1];  t (B,) in 1..T;  s = t - 1;  z (B, c.z) the latent;  x_s, x_t the pictures after s and t steps
# x0' = tanh(G(x_t, z, t)) is what G makes of x_t (of points without tanh);  D(x_s, x_t, t) > 0 says that x_s is real


# ======================================================================================================== The method
def network(c, shape):
    """The generator for data of this shape, (C, H, W) or (2,)."""
    if len(shape) == 1:
        return PointsGenerator(shape[0], c.width, c.z)
    return UNet(shape[0], shape[0], shape[-1], c.width, c.multipliers, c.blocks, c.attention, c.heads, c.labels, c.z,
                resample=c.resample).to(memory_format=torch.channels_last)  # spares a copy at each convolution


def tables(c):
    """By t, of x_s from x0 and of x_t from x_s: float32 (4, T + 1), sqrt(alpha_bar_s), sqrt(1 - alpha_bar_s), sqrt(1 - beta_t), sqrt(beta_t);
    and of x_s from what G makes: float32 (T + 1, 5), the coefficients of kernels/diffuse.py's update. t = 0 is unused."""
    ab = alpha_bar("ddgan", c.T)
    ab_s = torch.cat([ab[:1], ab[:-1]])
    c_x, c_0, beta, beta_tilde = posterior(ab, ab_s)
    forward = torch.stack([ab_s.sqrt(), (1 - ab_s).sqrt(), (1 - beta).sqrt(), beta.sqrt()])
    zero, one = torch.zeros_like(ab), torch.ones_like(ab)
    rest = {"posterior": (c_x, c_0, beta_tilde.sqrt()),  # eq. 4: x_s ~ q(x_s | x_t, x0')
            "renoise": (zero, ab_s.sqrt(), (1 - ab_s).sqrt()),  # x_s ~ q(x_s | x0'), which forgets x_t
            "direct": (zero, one, zero)}[c.fake]
    return forward.float(), torch.stack([zero, one, *rest], 1).float()


def times(c, draw):
    """t in 1..T, by their shares, of this process's part of the batch; and how many samples of the whole batch have each t: (T,)."""
    pretrain = draw <= 2 * c.pretrain + 1  # two draws an update
    share = torch.tensor((c.pretrain_t_weights if pretrain else c.t_weights) or [1] * c.T, dtype=torch.float64)
    u = runs.spread(c, draw, slice(None), alike=4)  # since D compares four samples
    t = torch.bucketize(u, share.cumsum(0)[:-1] / share.sum(), right=True) + 1
    return t[runs.rows(c.batch)].to(c.device), t.bincount(minlength=c.T + 1)[1:].to(c.device)


def real_pair(c, x0, t, table, draw):
    """x_s and x_t of the forward process: x_t is made of x_s."""
    first = runs.rows(c.batch).start
    x_s = add_noise(x0, table[0, t], table[1, t], c.seed, first, draw, NOISE, return_eps=False)
    return x_s, add_noise(x_s, table[2, t], table[3, t], c.seed, first, draw + 1, NOISE, return_eps=False)


def generate(c, net, x_t, t, z, label=None):
    """x0' (B, ...) in float32; unbounded for points, and with --fake direct, where it is x_s."""
    with runs.autocast(c):
        out = net(x_t, t * (1000 / c.T), label, z if c.z else None)
    return out.float() if c.fake == "direct" or x_t.ndim == 2 else out.float().tanh()


def fake_half(c, net, x_t, t, table, draw, label, wanted=None):
    """x_s as the generator would have it, differentiable, and x0'; with `wanted`, by that of four latents which comes nearest to it.

    Least squares with one latent teach G to ignore it, and the GAN hardly brings it back. Of several, each answers for a part of what
    x0 may be: implicit maximum likelihood (Li and Malik 2018).
    """
    first = runs.rows(c.batch).start
    z = randn((len(x_t), 1 if wanted is None else 4, max(c.z, 1)), c.seed, first, draw + 2, NOISE, device=c.device)
    if wanted is not None:
        with torch.no_grad():
            error = [(generate(c, net, x_t, t, z[:, i], label) - wanted).square().flatten(1).sum(1) for i in range(4)]
        z = z.take_along_dim(torch.stack(error).argmin(0)[:, None, None], 1)
    x0 = generate(c, net, x_t, t, z[:, 0], label)
    return denoise_step(x_t, x0, table[t], c.seed, first, draw + 3, NOISE), x0


def gan_loss(c, logit, real):
    """Of each sample, from D's logits (B,): small where they say real (or, with real False, fake)."""
    if c.gan_loss == "bce":
        return F.binary_cross_entropy(logit.sigmoid(), torch.full_like(logit, real), reduction="none")
    return F.softplus(-logit if real else logit)


def penalty(logit, x_s):
    """R1 without its weight (Mescheder 2018): |grad D|^2 at real x_s, the mean over the batch, differentiable."""
    grad, = torch.autograd.grad(logit.sum(), x_s, create_graph=True)
    return grad.square().flatten(1).sum(1).mean()


def decayed(c, lr, step):
    """The learning rate that lr has become: along a cosine to 1e-5 over c.decay updates, and so from there on; 0: constant."""
    low, done = min(lr, 1e-5), min(1, step / c.decay) if c.decay else 0
    return low + (lr - low) * (1 + math.cos(math.pi * done)) / 2


def trouble(c, real, fake, spread):
    """What is wrong, in words with what usually helps, or None. At each t, real, fake: D's accuracy; spread: of x0', over the data's."""
    flat = [t for t, (s, held) in enumerate(zip(spread, c.recon or [0] * c.T), 1) if s < 0.1 and held < 1]  # least squares do flatten
    if flat:
        return (f"what G makes hardly varies at t = {', '.join(map(str, flat))} (below a tenth of the data's standard deviation): a collapse. "
                "What usually helps: a smaller --lr, a larger --r1, with --T above 1 some --pretrain")
    sure = [t for t, worst in enumerate(map(min, zip(real, fake)), 1) if worst > 0.995]
    if sure:
        return (f"D tells every real pair from every fake one at t = {', '.join(map(str, sure))}, so that G learns little. What usually "
                "helps: a larger --r1, a smaller --lr-d or --width-d")


# ============================================================================================================ Sample
@torch.no_grad()
def sample(c, net, shape, first, n, label=None, frames=None):
    """Draw samples first .. first + n - 1 of c.seed with T network evaluations (eq. 6).

    label: (n,) int64 or None; frames: a list that receives x0' of each step. Returns (n, *shape).
    """
    x = randn((n, *shape), c.seed, first, stream=START, device=c.device)  # x_T
    table = tables(c)[1].to(c.device)
    index, seed = torch.arange(first, first + n, device=c.device), torch.tensor(c.seed, device=c.device)
    for t in torch.arange(c.T, 0, -1, device=c.device)[:, None]:
        x, x0 = runs.replayed(c, step, net, x, t, table, seed, index, label)
        if frames is not None:
            frames.append(x0.cpu())
    return x.clone()  # a graph's own result would change with its next replay


def step(c, net, x, t, table, seed, index, label):
    """From x_t to x_s, and x0'. t (1,), seed (), index (n,): which step and samples, on x's device."""
    z = randn((len(x), max(c.z, 1)), seed, index, t[0], START, device=x.device)
    x0 = generate(c, net, x, t.expand(len(x)), z, label)
    return denoise_step(x, x0, table[t][0], seed, index, t[0], STEP), x0


# ============================================================================================================= Train
def train(c):
    """Both networks in turn, each with its own t, noise and z. Returns whether there was anything left to train."""
    runs.join(c)
    data = runs.load_data(c)
    c.labels = runs.count_labels(c, data.classes)
    torch.manual_seed(c.seed)
    with runs.inputs():
        net = network(c, data.shape).to(c.device)
        critic = Discriminator(data.shape, c.width_d, c.labels).to(c.device, memory_format=torch.channels_last)
    ema = runs.EMA(net, c.ema)
    optimizer, optimizer_d = (torch.optim.Adam(n.parameters(), lr, (0.5, 0.9), fused=c.device.type != "mps")
                              for n, lr in ((net, c.lr), (critic, c.lr_d)))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer, critic=critic, optimizer_d=optimizer_d)
    G, D = (torch.compile(net), torch.compile(critic)) if c.compile else (net, critic)
    forward, reverse = (table.to(c.device) for table in tables(c))
    signal, recon = alpha_bar("ddgan", c.T).float().to(c.device), torch.tensor([0, *(c.recon or [0] * c.T)], device=c.device)

    def judged(D, x_s, x_t, t, label):
        with runs.autocast(c):
            return D(x_s, x_t, t * (1000 / c.T), label).float()

    def by_t(value, t, count):  # means over the samples of each t: (T,); of the whole batch, once Run has averaged the processes
        return torch.zeros(c.T, device=c.device).index_add(0, t - 1, value.detach().float()) * runs.world() / count

    for step in run:
        x0, label = runs.training_batch(data, c, step, c.flip)
        label = torch.where(label < 0, c.labels, label) if c.conditional else None
        optimizer.param_groups[0]["lr"] = decayed(c, c.lr, step) if step > c.pretrain else c.lr_pretrain * min(1, step / 100)
        optimizer_d.param_groups[0]["lr"] = decayed(c, c.lr_d, step)

        loss_d = loss_g = torch.zeros(len(x0), device=c.device)  # logged while that network is not trained on it
        real = fake = torch.full_like(loss_d, 0.5)  # how often D is right: at rest, as a coin is

        # The discriminator: real pairs against fake ones of the same x_t
        (t, count), draw = times(c, 2 * step), 8 * step
        if step > c.pretrain - 300:
            x_s, x_t = real_pair(c, x0, t, forward, draw)
            with torch.no_grad():
                x_f, _ = fake_half(c, G, x_t, t, reverse, draw, label)
            penalised = c.r1 > 0 and step % c.r1_every == 0
            judge = critic if penalised else D  # what is compiled cannot be differentiated twice
            real_logit, fake_logit = judged(judge, x_s.requires_grad_(penalised), x_t, t, label), judged(judge, x_f, x_t, t, label)
            real, fake = real_logit > 0, fake_logit < 0
            loss_d = gan_loss(c, real_logit, True) + gan_loss(c, fake_logit, False)
            loss = loss_d.mean()
            if penalised:  # lazily, yet not multiplied by the interval
                r1 = penalty(real_logit, x_s)
                critic.r1, loss = r1.detach(), loss + c.r1 / 2 * r1
            optimizer_d.zero_grad(set_to_none=True)
            loss.backward()
            runs.average_gradients(critic.parameters())
            optimizer_d.step()

        # The generator, with t, noise and z of its own
        (u, count_u), draw = times(c, 2 * step + 1), 8 * step + 4
        x_s, x_u = real_pair(c, x0, u, forward, draw)
        wanted = x_s if c.fake == "direct" else x0
        nearest = c.z and c.pretrain - c.pretrain_z < step <= c.pretrain
        x_f, x0_ = fake_half(c, G, x_u, u, reverse, draw, label, wanted if nearest else None)
        error = (x0_ - wanted).square().flatten(1).mean(1)
        loss = (signal[u] * error).mean()
        if step > c.pretrain:
            loss_g = gan_loss(c, judged(D, x_f, x_u, u, label), True)
            loss = (loss_g + recon[u] * error).mean()  # where D sees little G would drift: at large t; at t = 1 x0 is nearly known
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(net.parameters()))
        runs.average_gradients(net.parameters())
        optimizer.step()
        ema.update(net)

        run.log(real=by_t(real, t, count), fake=by_t(fake, t, count), loss_d=by_t(loss_d, t, count), loss_g=by_t(loss_g, u, count_u),
                r1=critic.r1, error=by_t(error, u, count_u),
                spread=by_t((spread_of_fours(x0_) / spread_of_fours(x0)).flatten(1)[:, 0], u, count_u))
        if run.last and step % 500 == 0 and step > c.pretrain + 500:
            run.warn(trouble(c, run.last["real"], run.last["fake"], run.last["spread"]))
    if run.step <= c.pretrain:
        run.warn(f"the GAN has not begun: the first {c.pretrain} updates are least squares (--pretrain)")
    runs.leave()
    return run.step > run.began


# ============================================================================================================== Main
def check(c):
    """What the flags of one command, or flags and checkpoint together, cannot mean."""
    with runs.inputs():
        if c.steps not in (0, c.T):
            raise ValueError(f"--steps {c.steps}: this model has T = {c.T} and takes each step once; leave --steps out")
        for applies, changes in ((c.T == 1, PLAIN), (c.fake == "direct", DIRECT)):
            if applies:
                vars(c).update({k: v for k, v in changes.items() if k not in c.given and getattr(c, k) == getattr(Config, k)})
        runs.idle(c)
        if c.train and c.batch % (4 * runs.world()):
            raise ValueError(f"--batch {c.batch}: D compares samples in fours, so give a multiple of {4 * runs.world()}")
        if c.train and c.iters <= c.pretrain and "pretrain" not in c.given:
            raise ValueError(f"--iters {c.iters} ends before the GAN begins: give more than {c.pretrain}, or a smaller --pretrain")
        if "pretrain_z" in c.given and c.pretrain_z > c.pretrain > 0:
            raise ValueError(f"--pretrain-z {c.pretrain_z} is more than --pretrain {c.pretrain}: give at most as many")
        if "pretrain_z" not in c.given:
            c.pretrain_z = min(c.pretrain_z, c.pretrain // 4)
        for flag in ("t_weights", "pretrain_t_weights", "recon"):
            each = getattr(c, flag)
            if len(each) not in (0, c.T):
                if flag in c.given:
                    raise ValueError(f"--{flag.replace('_', '-')} has {len(each)} numbers for T = {c.T} steps: give one for each")
                setattr(c, flag, ())
        for flag, each in (("t-weights", c.t_weights), ("pretrain-t-weights", c.pretrain and c.pretrain_t_weights)):
            share = each or [1] * c.T
            if c.train and c.batch * min(share) < 4 * sum(share):
                equal = f", or equal shares of t, --{flag} ''" if each and c.batch >= 4 * c.T else ""
                raise ValueError(f"--batch {c.batch} leaves some t without four samples for D to compare: give at least "
                                 f"{-(-4 * sum(share) // min(share))}{equal}")
        if not c.conditional and c.label >= 0:
            raise ValueError("--label needs a model trained with --conditional")


def main():
    c = runs.parse("ddgan", Config, RECIPES, __doc__)
    if c.train:
        check(c)
        runs.finish(c, train(c))
    if runs.rank() != 0 or not (c.sample or c.evaluate):
        return
    saved, c = runs.trained(c)
    check(c)
    shape, c.labels = saved["data"]["shape"], runs.count_labels(c, saved["data"]["classes"])
    with runs.inputs():
        ema = runs.EMA(network(c, shape).to(c.device), c.ema)
        runs.load_states(saved, c.checkpoint, ema=ema)
    net = torch.compile(ema.net) if c.compile else ema.net
    if c.sample:
        frames, label = [] if c.out.endswith(".gif") else None, runs.sample_labels(c, c.sheet, c.label)
        x, watch = runs.draw(c, lambda *which: sample(c, net, shape, *which, frames), c.sheet, label)
        with runs.inputs():
            print(watch.report(c.T, pictures.save(c.out or c.run / "samples.png", x, label, frames)))
    if c.evaluate:
        n = c.n or 1000
        x, watch = runs.draw(c, lambda *which: sample(c, net, shape, *which), n, runs.sample_labels(c, n))
        metrics.write_result(c, metrics.judge(c, x, c.T, watch))


if __name__ == "__main__":
    main()
