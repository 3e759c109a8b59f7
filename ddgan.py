"""DDGAN: denoising diffusion GAN, "Tackling the generative learning trilemma".
Xiao, Kreis, Vahdat 2021 (arXiv:2112.07804). T is at most 8, s = t - 1, z ~ N(0, 1) a latent.

    noising    x_t = sqrt(1 - beta_t) x_s + sqrt(beta_t) eps      x_s likewise of x0       (1)
    training   D: softplus(-D(x_s, x_t, t)) + softplus(D(x_s', x_t, t)), and R1            (5)
               G: softplus(-D(x_s', x_t, t))
    sampling   x0' = G(x_t, z, t)
               x_s' = c_x x_t + c_0 x0' + c_n eps      the posterior q(x_s | x_t, x0')     (6)

    python ddgan.py --train                         # digits, drawn on the spot
    python ddgan.py --sample --n 100                # T = 4 network evaluations each
    python ddgan.py --evaluate                      # FCD, precision, recall, ..., modes
    python ddgan.py --train --data gaussians        # 2-D; with --T 1 --run DIR the plain GAN
    python ddgan.py --train --data cifar10          # the paper's recipe, for a GPU

Digits on two cores of a Xeon: 14 minutes, FCD 0.89 to 1.00 (floor 0.16), recall 0.94 to 0.95,
three runs. The 25 Gaussians: all of them, 96 % of the points within 3 sigma, 8 minutes. What did
it, by trial and with the failures, is in assets/README.md.
"""
import math
from collections import namedtuple
from dataclasses import dataclass

from common import early  # noqa: F401  first, since torch takes seconds
import torch
import torch.nn.functional as F
from torch import nn

from common import draws, flags, gpu, metrics, processes, runs, sampling, unet
from common.draws import NOISE, START, STEP, sample_labels
from common.files import stop
from common.flags import option
from common.schedules import alpha_bar, posterior
from common.unet import fourier_input, fourier_time
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================ Flags
HEAD_START = 300  # last updates of --pretrain, in which D learns already


@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    # the paper's
    T: int = option(4, "steps from data to noise, each a network evaluation; 1: a plain GAN, of "
                    "pictures without --pretrain and with other rates", low=1, high=8,
                    of_model=True)
    z: int = option(100, "size of the generator's latent; 0: none, x_t alone decides", low=0,
                    of_model=True)
    fake: str = option("posterior", "how x_{t-1} comes from the generator: posterior, of q(x_{t-1} "
                       "| x_t, x0'); renoise, x0' noised anew; direct, as it is",
                       choices=("posterior", "renoise", "direct"), needs="T", of_model=True)
    gan_loss: str = option("softplus", "of the logits, Goodfellow's that does not saturate; bce: "
                           "the same by sigmoid, then log", choices=("softplus", "bce"))
    r1: float = option(1.0, "weight gamma of the penalty gamma/2 |grad D|^2 by the real x_{t-1}",
                       low=0)
    r1_every: int = option(4, "updates from penalty to penalty", low=1, needs="r1")
    width_d: int = option(64, "channels of the discriminator at half resolution, where it begins",
                          low=2, of_model=True)
    lr_d: float = option(1.4e-3, "learning rate of the discriminator's Adam", above=0)
    decay: int = option(0, "updates over which both rates fall to 1e-5, along a cosine; 0: "
                        "constant", low=0)
    steps: int = option(0, "network evaluations, which is T and nothing else", "sample evaluate",
                        low=1)
    # beyond the paper
    t_weights: tuple = option((), "shares of the batch that t = 1..T have; equal with ''", low=1,
                              needs="T", one_for_each="T")
    pretrain: int = option(2_600, "first updates, in which G learns by alpha_bar_t |x0' - x0|^2 "
                           f"alone; D learns only in the last {HEAD_START} of them", low=0)
    pretrain_z: int = option(0, "last of these updates, in which G tries four latents and learns "
                             "with the one that comes nearest to x0; default 600, and at most a "
                             "quarter of them", low=0, high="pretrain", needs="pretrain z")
    pretrain_t_weights: tuple = option((), "shares of t in these updates; equal with ''", low=1,
                                       needs="pretrain T", one_for_each="T")
    lr_pretrain: float = option(2e-3, "the generator's learning rate in these updates", above=0,
                                needs="pretrain")
    recon: tuple = option((), "weights at t = 1..T of the mean square of x0' - x0 beside the GAN's "
                          "loss; none with ''", low=0, part=float, one_for_each="T")


FLAGS = (Config, flags.Unet, flags.Training, flags.Labels)

# as the paper trains: no least squares, each t as often
GAN_ALONE = dict(pretrain=0, t_weights=(), recon=())
# appendix C, but for D, which is ours and begins at half resolution
PAPER = GAN_ALONE | dict(resample="biggan", multipliers=(1, 1, 2, 2, 4, 4), blocks=2,
                         attention=(16,), r1_every=10, flip=True, width_d=128)
RECIPES = {  # by data set or circumstance; each row that applies is laid over those above it
    "": dict(width=64, multipliers=(1, 2, 2), blocks=1, attention=(16, 8), heads=4, batch=64,
             lr=3e-4, ema=0.999, iters=100_000,
             pretrain_z=lambda c: min(600, c.pretrain // 4)),
    "T=4": dict(t_weights=(3, 11, 1, 1), pretrain_t_weights=(7, 7, 1, 1),
                recon=(8.0, 0.0, 5.0, 5.0)),
    "T=1": dict(pretrain=0, lr=2e-4, lr_d=2e-4),  # of pure noise least squares learn the mean
    "fake=direct": dict(pretrain=0, recon=()),  # of x_s too, most of which is noise at large t
    "mnist": dict(multipliers=(1, 2, 2, 2), decay=40_000, iters=40_000),
    "fashion-mnist": dict(multipliers=(1, 2, 2, 2), decay=40_000, iters=40_000),
    "cifar10": PAPER | dict(width=128, multipliers=(1, 2, 2, 2), batch=256, lr=1.6e-4, lr_d=1.25e-4,
                            r1=0.02, r1_every=15, decay=350_000, iters=350_000, ema=0.9999),
    "celeba-hq": PAPER | dict(T=2, size=256, batch=32, lr=2e-4, lr_d=1e-4, r1=2, decay=750_000,
                              iters=750_000),  # a folder of this name
    "lsun": PAPER | dict(size=256, lr=1.6e-4, lr_d=1e-4, decay=985_000, iters=985_000),
    "pictures": dict(decay=100_000, flip=True),
    # without a GPU what is above is days; what is below knows a laptop
    "cpu": dict(size=0, width=16, multipliers=(1, 2, 4), blocks=1, attention=(), resample="conv",
                width_d=32, batch=64, minutes=30),
    "digits": dict(width=32, multipliers=(1, 2, 2), width_d=64, attention=(), batch=64,
                   decay=7_000, iters=7_000, minutes=14),
    "stacked": dict(width=32, multipliers=(1, 2, 2), width_d=64, attention=(), batch=64,
                    decay=7_000, iters=7_000, minutes=14),
    "swirl": GAN_ALONE | dict(z=16, width=128, width_d=128, batch=512, lr=2e-3, lr_d=2e-3,
                              r1=0.05, r1_every=1, decay=30_000, iters=30_000, minutes=0),
    "gaussians": GAN_ALONE | dict(z=16, width=128, width_d=128, batch=512, lr=2e-3, lr_d=2e-3,
                                  r1=0.05, r1_every=1, decay=30_000, iters=30_000, minutes=0),
    "init": dict(pretrain=0),  # G knows by now what least squares teach
}

# ========================================================================================= Notation
# x0 (B, C, H, W) data in [-1, 1], or (B, 2);  t (B,) in 1..T, s = t - 1;  z (B, c.z) the latent
# x_s, x_t: a real pair;  x0' = tanh(G(x_t, z, t)) (in code x0_; of points without tanh), of which
# x_s' (in code x_f) is made;  D(x_s, x_t, t) > 0 says that x_s is real;  eps ~ N(0, 1)

D_HALF, G_HALF = 0, 1  # of an update: each has its own t, noise and z
Places = namedtuple("Places", "x_s x_t z x_f")
Kind = namedtuple("Kind", "pretrain judged penalised tries")  # what an update does, each a bool


def places(step, half):
    """The numbers under which an update's noise is drawn: eight, four for each half.

    step: which update it is, an int or () int64.
    """
    first = 8 * step + 4 * half
    return Places(first, first + 1, first + 2, first + 3)


# ===================================================================================== The networks
def network(c):
    """The generator: net(x_t, t / c.T, label, z)."""
    if len(c.shape) == 1:
        return unet.fitting(c, lambda: PointsGenerator(c.shape[0], c.width, c.z))
    return unet.build(c, c.shape, c.shape[0], z_dim=c.z)


class Discriminator(nn.Module):
    """D(x_s, x_t, t, label) -> logits (B,), t in [0, 1].

    The U-Net's blocks, from half of the map's side down to 4; for points an MLP.
    """

    def __init__(self, shape, width, classes):
        super().__init__()
        self.register_buffer("r1", torch.zeros(()))  # the last penalty, to be shown until the next
        if len(shape) == 1:
            self.mlp = mlp(2 * shape[0] * 7 + 17, 1, width, nn.LeakyReLU(0.2))
            return
        downs = max(1, round(math.log2(shape[-1] / 4)))
        channels = [width * min(2 ** i, 4) for i in range(downs)]
        self.embedding = unet.Embedding(width, 4 * width, classes)
        self.first = nn.Conv2d(2 * shape[0], width, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for i, (a, b) in enumerate(zip([width, *channels], channels)):
            self.blocks.append(unet.Block(a, b, 4 * width, -1 if i else 0))
        self.norm = unet.norm(channels[-1])
        self.mix = nn.Conv2d(channels[-1] + 1, channels[-1], 3, padding=1)
        side = -(-(shape[-1] // 2) // 2 ** (downs - 1))
        self.last = nn.Linear(channels[-1] * side ** 2, 1)

    def forward(self, x_s, x_t, t, label=None):
        x = torch.cat([x_s, x_t], 1)
        if x.ndim == 2:
            x = fourier_input(4 * x, (-2, -1, 0))  # what is smaller than the distance of modes
            x = torch.cat([x, fourier_time(t, 16), spread_of_fours(x_s)], 1)
            return self.mlp(x).squeeze(1)
        e, h = self.embedding(t, label), self.first(x)
        for block in self.blocks:
            h = block(h, e)
        h = torch.cat([self.norm(h), spread_of_fours(h)], 1)
        h = F.silu(self.mix(h))
        return self.last(h.flatten(1)).squeeze(1)


def spread_of_fours(h):
    """The minibatch standard deviation (Karras 2017) of four consecutive samples each.

    As one more channel of h (B, C, ...): (B, 1, ...).
    """
    fours = h.to(torch.promote_types(h.dtype, torch.float32)).unflatten(0, (-1, 4))
    # Tensor.var is far slower along this dimension
    var = (fours - fours.mean(1, keepdim=True)).square().mean(1)
    std = (var + 1e-8).sqrt().flatten(1).mean(1)  # (B / 4,)
    std = std.repeat_interleave(4).view(-1, *[1] * (h.ndim - 1))
    return std.expand(-1, 1, *h.shape[2:]).to(h.dtype)


def mlp(c_in, c_out, width, activation):
    """Three hidden layers.

    Their first biases are spread over the points, or every kink would pass through 0.
    """
    layers = [nn.Linear(c_in, width), nn.Linear(width, width), nn.Linear(width, width)]
    parts = []
    for i, layer in enumerate(layers):
        nn.init.kaiming_normal_(layer.weight, 0.2)
        nn.init.normal_(layer.bias, std=0.1 if i else 1.0)
        parts += [layer, activation]
    return nn.Sequential(*parts, nn.Linear(width, c_out))


class PointsGenerator(nn.Module):
    """The generator of points, with the U-Net's call.

    tanh: modes are plateaus with cliffs between them, which ReLU hardly learns.
    """

    def __init__(self, dim, width, z):
        super().__init__()
        self.mlp = mlp(dim + 16 + z, dim, width, nn.Tanh())

    def forward(self, x, t, label=None, z=None):
        parts = [4 * x, fourier_time(t, 16)]
        if z is not None:
            parts.append(z)
        return self.mlp(torch.cat(parts, 1))


# ======================================================================================= The method
def forward(c):
    """Coefficients of a real pair, a row for each t of 1..T: float32 (T, 4).

    sqrt(alpha_bar_s), sqrt(1 - alpha_bar_s) of x_s from x0; sqrt(1 - beta_t), sqrt(beta_t) of x_t
    from x_s.
    """
    ab = alpha_bar("ddgan", c.T)
    ab_s, beta = ab[:-1], 1 - ab[1:] / ab[:-1]
    return torch.stack([ab_s.sqrt(), (1 - ab_s).sqrt(), (1 - beta).sqrt(), beta.sqrt()], 1).float()


def walk(c):
    """Coefficients of x_s' from what G makes, a row for each t of 1..T: float32 (T, 5).

    p_x, p_out, c_x, c_0, c_n of kernels/diffuse.py's update.
    """
    ab = alpha_bar("ddgan", c.T)
    ab_t, ab_s = ab[1:], ab[:-1]
    c_x, c_0, _, beta_tilde = posterior(ab_t, ab_s)
    zero, one = torch.zeros_like(ab_t), torch.ones_like(ab_t)
    rest = {"posterior": (c_x, c_0, beta_tilde.sqrt()),  # x_s' ~ q(x_s | x_t, x0')
            "renoise": (zero, ab_s.sqrt(), (1 - ab_s).sqrt()),  # ~ q(x_s | x0'), forgets x_t
            "direct": (zero, one, zero)}[c.fake]
    return torch.stack([zero, one, *rest], 1).float()


def real_pair(c, x0, t, table, first, place):
    """x_s and x_t of the forward process: x_t is made of x_s. table: of forward; place: Places."""
    signal, noise, keep, fresh = table[t - 1].unbind(1)
    x_s = add_noise(x0, signal, noise, c.seed, first, place.x_s, NOISE, return_eps=False)
    x_t = add_noise(x_s, keep, fresh, c.seed, first, place.x_t, NOISE, return_eps=False)
    return x_s, x_t


def generate(c, net, x_t, t, z, label=None):
    """x0' (B, ...) in float32; unbounded for points, and with --fake direct, where it is x_s'."""
    with flags.autocast(c):
        out = net(x_t, t / c.T, label, z if c.z else None)
    return out.float() if c.fake == "direct" or x_t.ndim == 2 else out.float().tanh()


def fake_half(c, net, x_t, t, table, first, place, label, wanted=None):
    """x_s' as the generator would have it, differentiable, and x0'.

    table: of walk; first: the number of the first sample; place: Places. With `wanted` G learns
    with the one of four latents that comes nearest to it.
    """
    many = 1 if wanted is None else 4
    z = randn((len(x_t), many, max(c.z, 1)), c.seed, first, place.z, NOISE, device=c.device)
    z = z[:, 0] if wanted is None else nearest(c, net, x_t, t, z, label, wanted)
    x0_ = generate(c, net, x_t, t, z, label)
    return denoise_step(x_t, x0_, table[t - 1], c.seed, first, place.x_f, NOISE), x0_


def logits(c, D, x_s, x_t, t, label):
    """D's logits of pairs, float32 (B,)."""
    with flags.autocast(c):
        return D(x_s, x_t, t / c.T, label).float()


def gan_loss(c, logit, real):
    """Of each sample, from D's logits (B,): small where they say real (or, if False, fake)."""
    if c.gan_loss == "bce":
        wanted = torch.full_like(logit, real)
        return F.binary_cross_entropy(logit.sigmoid(), wanted, reduction="none")
    return F.softplus(-logit if real else logit)


def discriminator_loss(c, real, fake):
    """Eq. 5, from the logits (B,) of real and of fake pairs: (B,)."""
    return gan_loss(c, real, True) + gan_loss(c, fake, False)


def generator_loss(c, fake):
    """Goodfellow 2014's that does not saturate: fake pairs are to be taken for real. (B,)"""
    return gan_loss(c, fake, True)


def penalty(logit, x_s):
    """R1 without its weight (Mescheder 2018): |grad D|^2 at real x_s, the batch's mean.

    Differentiable.
    """
    grad, = torch.autograd.grad(logit.sum(), x_s, create_graph=True)
    return grad.square().flatten(1).sum(1).mean()


def decayed(c, lr, step):
    """What lr has become: along a cosine to 1e-5 over c.decay updates, and so from there on."""
    low = min(lr, 1e-5)
    done = min(1, step / c.decay) if c.decay else 0  # 0: constant
    return low + (lr - low) * (1 + math.cos(math.pi * done)) / 2


# =========================================================================================== Sample
@torch.no_grad()
def sample(c, net, first, n, steps=None, label=None, frames=None):
    """Samples first .. first + n - 1 of c.seed, with T network evaluations.

    steps: c.T or None; label: int64 (n,) or None; frames: a list that receives each step's x0'.
    Returns (n, *c.shape), about in [-1, 1]. Of c are read T, z and fake, as the model has them;
    shape, device, precision; and seed.
    """
    if steps not in (None, c.T):
        raise ValueError(f"this model takes each of its {c.T} steps once: leave steps out")
    tau = torch.arange(1, c.T + 1, device=c.device)
    table = walk(c).to(c.device)
    which = torch.arange(first, first + n, device=c.device)
    seed = torch.tensor(c.seed, device=c.device)
    down = sampling.captured(denoise, c, net)  # on CUDA a graph, replayed
    x = randn((n, *c.shape), c.seed, first, stream=START, device=c.device)  # x_T
    for i in range(c.T)[::-1]:
        x, x0_ = down(x, tau[i:i + 1], table[i], seed, which, label)
        if frames is not None:
            frames.append(x0_.cpu())
    return x


def denoise(c, net, x, t, row, seed, which, label):
    """From x_t to x_s', and x0' on the way: the last two lines of this file's head.

    t (1,): the step; row (5,): its coefficients; seed () and which (n,): what z, eps are drawn by.
    """
    z = randn((len(x), max(c.z, 1)), seed, which, t[0], START, device=x.device)
    x0_ = generate(c, net, x, t.expand(len(x)), z, label)
    return denoise_step(x, x0_, row, seed, which, t[0], STEP), x0_


# ================================================================================= Beyond the paper
# G begins by least squares, each t has a share of the batch, and trouble is told.
def times(c, step, half):
    """t in 1..T of this process's part of the batch, by shares, and the whole batch's counts.

    int64 (b,), and how many samples of the whole batch have each t, int64 (T,).
    """
    shares = c.pretrain_t_weights if step <= c.pretrain else c.t_weights
    shares = torch.tensor(shares or [1] * c.T, dtype=torch.float64)
    u = draws.spread(c, 2 * step + half, alike=4)  # since D compares four samples
    t = torch.bucketize(u, shares.cumsum(0)[:-1] / shares.sum(), right=True) + 1
    count = t.bincount(minlength=c.T + 1)[1:]
    return gpu.sent(t[draws.part(c.batch)], c.device), gpu.sent(count, c.device)


@torch.no_grad()
def nearest(c, net, x_t, t, z, label, wanted):
    """Of latents z (B, 4, c.z), those with which G comes nearest to `wanted`: (B, c.z).

    Least squares with one latent teach G to ignore it, and the GAN hardly brings it back. Of
    several, each answers for a part of what x0 may be: implicit maximum likelihood (Li 2018).
    """
    error = []
    for one in z.unbind(1):
        off = generate(c, net, x_t, t, one, label) - wanted
        error.append(off.square().flatten(1).sum(1))
    best = torch.stack(error).argmin(0)
    return z.take_along_dim(best[:, None, None], 1)[:, 0]


def mean_by_t(c, value, t, count):
    """Means of value (b,) over the samples of each t: (T,), for run.log.

    Of the whole batch, by times' counts, once Run has averaged the processes.
    """
    total = torch.zeros(c.T, device=c.device).index_add(0, t - 1, value.detach().float())
    return total * processes.world() / count


def trouble(c, real, fake, spread):
    """What is wrong, in words with what usually helps, or None.

    At each t, real and fake: how often D is right; spread: of x0', over the data's.
    """
    held = c.recon or [0] * c.T  # where least squares weigh, they do flatten
    flat = [t for t in range(1, c.T + 1) if spread[t - 1] < 0.1 and held[t - 1] < 1]
    if flat:
        return (f"what G makes hardly varies at t = {', '.join(map(str, flat))} (below a tenth of "
                "the data's standard deviation): a collapse. What usually helps: a smaller --lr, a "
                "larger --r1, with --T above 1 some --pretrain")
    sure = [t for t in range(1, c.T + 1) if min(real[t - 1], fake[t - 1]) > 0.995]
    if sure:
        return (f"D tells every real pair from every fake one at t = {', '.join(map(str, sure))}, "
                "so that G learns little. What usually helps: a larger --r1, a smaller --lr-d or "
                "--width-d")
    return None


def too_short(c, seconds, step):
    """That --minutes end within the least squares, at the pace of `step` updates, or None."""
    each = seconds / step
    if not c.minutes or 60 * c.minutes / each > c.pretrain:
        return None
    return (f"at this pace --minutes {c.minutes:g} end before the GAN begins: the first "
            f"{c.pretrain} updates are least squares (--pretrain), {c.pretrain * each / 60:.0f} "
            "minutes")


# ============================================================================================ Train
def descend(optimizer, net, loss):
    """One step of the optimizer of net, a module."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=runs.learnable(net))
    processes.average_gradients(net)
    optimizer.step()


def train(c):
    """Both networks in turn (algorithm 1 of any GAN), each with its own t, noise and z."""
    data = runs.begin(c)  # sets c.shape, c.labels and the seed
    net = network(c).to(c.device)
    critic = unet.fitting(c, lambda: Discriminator(c.shape, c.width_d, c.labels),
                          "--width-d")
    critic = critic.to(c.device, memory_format=torch.channels_last)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(runs.learnable(net), c.lr, (0.5, 0.9), **gpu.adam(c.device))
    optimizer_d = torch.optim.Adam(runs.learnable(critic), c.lr_d, (0.5, 0.9),
                                   **gpu.adam(c.device))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer, critic=critic,
                   optimizer_d=optimizer_d)
    G = torch.compile(net) if c.compile else net
    D = torch.compile(critic) if c.compile else critic

    noising, reverse = forward(c).to(c.device), walk(c).to(c.device)
    signal2 = alpha_bar("ddgan", c.T).float().to(c.device)
    recon = torch.tensor([0, *(c.recon or [0] * c.T)], device=c.device)  # by t

    def update(x0, label, first, number, t_d, count_d, t_g, count_g, kind):
        """What an update computes, of tensors. number: which update it is, () int64.

        t, count: of times, for D's half and G's. kind: whether G learns by least squares alone,
        whether D learns, with R1, and whether G learns with the nearest of four latents.
        """
        at_rest = torch.zeros(len(x0), device=c.device)  # logged while a network does not learn

        # The discriminator: real pairs against fake ones of the same x_t
        t, count = t_d, count_d
        loss_d = at_rest
        right_real = right_fake = at_rest + 0.5  # how often D is right: as often as a coin
        if kind.judged:
            place = places(number, D_HALF)
            x_s, x_t = real_pair(c, x0, t, noising, first, place)
            with torch.no_grad():
                x_f, _ = fake_half(c, G, x_t, t, reverse, first, place, label)
            judge = critic if kind.penalised else D  # a compiled one cannot be differentiated twice
            real = logits(c, judge, x_s.requires_grad_(kind.penalised), x_t, t, label)
            fake = logits(c, judge, x_f, x_t, t, label)
            loss_d = discriminator_loss(c, real, fake)
            loss = loss_d.mean()
            if kind.penalised:  # lazily, yet not multiplied by the interval
                r1 = penalty(real, x_s)
                critic.r1.copy_(r1.detach())
                loss = loss + c.r1 / 2 * r1
            descend(optimizer_d, critic, loss)
            right_real, right_fake = real > 0, fake < 0
        told = dict(real=mean_by_t(c, right_real, t, count),
                    fake=mean_by_t(c, right_fake, t, count),
                    loss_d=mean_by_t(c, loss_d, t, count))

        # The generator: fake pairs that D takes for real; at first by least squares alone
        t, count = t_g, count_g
        place = places(number, G_HALF)
        x_s, x_t = real_pair(c, x0, t, noising, first, place)
        wanted = x_s if c.fake == "direct" else x0
        x_f, x0_ = fake_half(c, G, x_t, t, reverse, first, place, label,
                             wanted if kind.tries else None)
        error = (x0_ - wanted).square().flatten(1).mean(1)
        if kind.pretrain:
            loss_g = at_rest
            loss = (signal2[t] * error).mean()
        else:
            loss_g = generator_loss(c, logits(c, D, x_f, x_t, t, label))
            # where D sees little G would drift: at large t, and at t = 1 x0 is nearly known
            loss = (loss_g + recon[t] * error).mean()
        descend(optimizer, net, loss)
        ema.update(net)

        # What is told, by t
        variety = (spread_of_fours(x0_) / spread_of_fours(x0)).flatten(1)[:, 0]
        return told | dict(loss_g=mean_by_t(c, loss_g, t, count), r1=critic.r1,
                           error=mean_by_t(c, error, t, count),
                           spread=mean_by_t(c, variety, t, count))

    update = gpu.recorded(update, c)  # with --graph a CUDA graph

    for step in run:
        # Data, times and rates
        x0, label, first = run.batch(step)  # first: number of its first sample
        pretrain = step <= c.pretrain
        rate = c.lr_pretrain * min(1, step / 100) if pretrain else decayed(c, c.lr, step)
        runs.set_rate(optimizer, rate)
        runs.set_rate(optimizer_d, decayed(c, c.lr_d, step))

        # One update: D begins before the GAN does, R1 is lazy
        judged = step > c.pretrain - HEAD_START
        penalised = judged and c.r1 > 0 and step % c.r1_every == 0
        tries = c.z > 0 and c.pretrain - c.pretrain_z < step <= c.pretrain
        run.log(**update(x0, label, first, gpu.number(step, c.device), *times(c, step, D_HALF),
                         *times(c, step, G_HALF), Kind(pretrain, judged, penalised, tries)))
        if step == 200:
            run.warn(too_short(c, run.seconds, step))
        if run.last and step % 500 == 0 and step > c.pretrain + 500:
            run.warn(trouble(c, run.last["real"], run.last["fake"], run.last["spread"]))
        n = run.shows(c.T)  # from time to time a sheet of what it draws by now
        if n:
            run.show(sample(c, ema.net, 0, n, c.T, sample_labels(c, n)))
    if run.step <= c.pretrain:
        run.warn(f"the GAN has not begun: the first {c.pretrain} updates are least squares "
                 "(--pretrain)")
    runs.end(c, run, c.T)


# ============================================================================================= Main
def check(c):
    """Stop for what the flags, or flags and checkpoint together, cannot mean."""
    if c.steps not in (0, c.T):
        stop(f"--steps {c.steps}: this model has T = {c.T} and takes each step once; leave --steps "
             "out")
    if not c.train:
        return
    fours = 4 * processes.world()
    if c.batch % fours:
        stop(f"--batch {c.batch}: D compares samples in fours, so give a multiple of {fours}")
    if c.iters <= c.pretrain and "pretrain" not in c.given:
        stop(f"--iters {c.iters} ends before the GAN begins: give more than {c.pretrain}, or a "
             "smaller --pretrain")
    check_shares(c, "--t-weights", c.t_weights)
    if c.pretrain:
        check_shares(c, "--pretrain-t-weights", c.pretrain_t_weights)


def check_shares(c, flag, given):
    """Stop where some t would not have four samples of a batch."""
    shares = given or [1] * c.T
    if c.batch * min(shares) < 4 * sum(shares):
        equal = f", or equal shares of t, {flag} ''" if given and c.batch >= 4 * c.T else ""
        stop(f"--batch {c.batch} leaves some t without four samples for D to compare: give at "
             f"least {-(-4 * sum(shares) // min(shares))}{equal}")


def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", seed=3. main has parsed them.
    """
    c = parsed or flags.settings("ddgan", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c)
    check(c)
    return c, runs.restored(c, network(c), saved)


def main():
    c = flags.parse("ddgan", FLAGS, RECIPES, __doc__)
    if c.train:
        check(c)
        train(c)
    if not (c.sample or c.evaluate):
        return
    c, net = load(parsed=c)
    if c.sample:
        draw = sampling.Draw(c, c.sheet, c.label)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, c.T, label, draw.frames))
        draw.save(c.T)
    if c.evaluate:
        metrics.prepare(c)
        draw = sampling.Draw(c, c.n or 1000)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, c.T, label))
        metrics.write_result(c, metrics.judge(c, draw, c.T))


if __name__ == "__main__":
    main()
