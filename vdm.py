"""VDM: variational diffusion models: a noise schedule that is learned, a loss that is a likelihood.
Kingma, Salimans, Poole, Ho 2021 (arXiv:2107.00630). What the paper calls z_t is x_t here, and
gamma(t) is log(noise^2 / signal^2). The weight sigmoid(gamma + 2) is Kingma and Gao's (2023,
arXiv:2303.00848).

    noising    x_t = signal_t x + noise_t eps     signal^2 = sigmoid(-gamma(t)) = 1 - noise^2 (1-4)
    training   1/2 gamma'(t) | eps - eps'(x_t, gamma(t)) |^2                                  (17)
               T/2 expm1(gamma(t) - gamma(s)) | eps - eps' |^2   s = t - 1/T: in T steps      (14)
    sampling   x' = p_x x_t + p_out net(x_t, gamma(t))           clipped to [-1, 1]           (10)
               x_s = c_x x_t + c_0 x' + c_n eps                  s < t, by q(x_s | x_t, x')   (9)

    python vdm.py --train                         # digits, drawn on the spot
    python vdm.py --sample --steps 50             # ancestral; with --flow deterministic
    python vdm.py --evaluate                      # bits/dim in its three terms, then FCD, ...
    python vdm.py --train --weight bound --run runs/bits      # for a likelihood, not for the eye

Digits on two cores of a Xeon: 2.5 minutes, FCD 1.3 (floor 0.16) at 50 steps, where ddim.py had 1.5
on the same day; with --weight bound 2.05 bits/dim; one run each.
"""
import copy
import math
from dataclasses import dataclass

from common import early  # noqa: F401  first, since torch takes seconds
import torch
import torch.nn.functional as F
from torch import nn

from common import draws, flags, gpu, metrics, pictures, processes, runs, sampling, unet
from common.data import POINTS
from common.draws import JUDGE, NOISE, START, STEP, sample_labels
from common.files import inputs, stop, written
from common.flags import option
from common.progress import progress
from common.schedules import prediction
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn

GAMMA_0, GAMMA_1 = -13.3, 5.0  # the ends: of clean data, of noise
TERMS = ("reconstruction", "latent KL", "diffusion")  # of the bound


# ============================================================================================ Flags
@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    T: int = option(0, "steps of the bound, 0: continuous time; with --evaluate: steps to judge a "
                    "model of continuous time by too", "train evaluate", low=0, of_model=True)
    gamma: str = option("cosine", "how gamma rises with t; learned: by the paper's monotone "
                        "network, for a loss that varies little", of_model=True,
                        choices=("learned", "linear", "cosine"))
    ends: str = option("fixed", "gamma(0) = -13.3 and gamma(1) = 5, or learned by the bound",
                       choices=("fixed", "learned"), of_model=True)
    weight: str = option("sigmoid", "of the loss; bound: none, for the fewest bits; sigmoid: "
                         "sigmoid(gamma + 2), for the eye", choices=("bound", "sigmoid"))
    predict: str = option("v", "what the network's output is", choices=("eps", "v"), of_model=True)
    fourier: tuple = option((7, 8), "powers n of sin, cos(2^n pi x) that the network is fed; none: "
                            "''", low=0, high=16, of_pictures=True, of_model=True)
    plain: bool = option(False, "the paper's network: one resolution, attention in the middle "
                         "alone, its input added to its output", of_pictures=True, of_model=True)
    weight_decay: float = option(0.0, "of AdamW", low=0)
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    steps: int = option(0, "network evaluations; default 50, or T where that is less",
                        "sample evaluate", low=1, high="T")
    spacing: str = option("cosine", "of the steps: even in the angle atan(noise / signal), or in "
                          "gamma", "sample evaluate", choices=("cosine", "gamma"))
    flow: bool = option(False, "no noise in the steps (the probability flow)", "sample evaluate")
    clip: bool = option(True, "keep x' in [-1, 1]", "sample evaluate", of_pictures=True)


FLAGS = (Config, flags.Unet, flags.Training, flags.Labels, flags.Guidance)

RECIPES = {  # by data set: "" is all of them, "pictures" any path; each is laid over those above
    "": dict(width=64, multipliers=(1, 2, 2), blocks=1, attention=(16, 8), heads=4, batch=64,
             lr=5e-4, ema=0.9995, iters=100_000),
    "mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "fashion-mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "cifar10": dict(plain=True, width=128, batch=128, lr=2e-4, ema=0.9999, weight_decay=0.01,
                    iters=10_000_000, weight="bound", predict="eps", ends="learned"),
    # the paper's (appendix B), without its dropout of 0.1
    "pictures": dict(flip=True),
    # without a GPU what is above is hours; what is below knows a laptop
    "cpu": dict(width=32, multipliers=(1, 2, 2), blocks=1, attention=(), batch=32, lr=1e-3,
                ema=0.999, warmup=100, iters=100_000, minutes=10,
                plain=False, weight="sigmoid", weight_decay=0.0, predict="v"),
    "digits": dict(width=32, attention=(), batch=64, lr=2e-3, ema=0.995, iters=3000,
                   minutes=2.5),
    "stacked": dict(width=64, attention=(8,), batch=64, lr=1e-3, ema=0.999, iters=20_000,
                    minutes=0),
    "swirl": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0),
    "gaussians": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0),
    "plain=True": dict(blocks=32),
    "weight=sigmoid": dict(ends="fixed"),
    "weight=bound": dict(gamma="learned"),
}

# ========================================================================================= Notation
# x0 (B, C, H, W) data in [-1, 1];  x = 255/256 x0, whose 256 levels are (2k + 1)/256 - 1: there the
# features sin, cos(2^n pi x), n = 7 and 8, are the same at each level, and tell how far a noised
# value is from the nearest one. Points (B, 2) have no levels: x = x0;  x' (in code x_): what is
# predicted of x
# t in [0, 1]: the draw of a sample, or a step;  s < t: the next step down
# gamma (B,) at t, from gamma_0 to gamma_1;  u: the share of that way, u(0) = 0 and u(1) = 1
# x_t: data noised;  signal, noise (B,): the two roots at gamma;  eps ~ N(0, 1);  guess: what the
# network says of x_t;  v = signal eps - noise x, hence eps = noise x_t + signal v
# L (B,): a sample's loss, in nats per value


# ======================================================================================= The method
class Gamma(nn.Module):
    """The noise schedule gamma(t), which rises from gamma_0 to gamma_1, both held exactly.

    linear   u = t
    cosine   u even in the angle atan(noise / signal): the two are a sine and a cosine. (Learned
             ends stretch it; it is made for those that they begin with.)
    learned  u = (1 - m) start + m network, where network is the paper's (appendix H): positive
             weights, 1,024 sigmoids, here moved and scaled to end at 0 and 1. All of it begins near
             the start: the cosine, or where the bound is the weight the line, which is better
             there: of the bound of Gaussian data two thirds lie at gamma < -5, where the cosine
             hardly goes.

    The default is what measured best on digits: the cosine with the weight sigmoid (FCD 1.31, 1.30;
    learned 1.64, 1.58; linear 3.7), learned with the bound (2.05 bits/dim; linear 2.09, cosine
    3.20).
    """

    def __init__(self, c, hidden=1024):
        super().__init__()
        self.learned = c.gamma == "learned"
        straight = c.gamma == "linear" or self.learned and c.weight == "bound"
        self.register_buffer("line", torch.tensor(float(straight)))  # 1 the line, 0 the cosine
        ends = torch.tensor([GAMMA_0, GAMMA_1])
        if c.ends == "learned":
            self.ends = nn.Parameter(ends)
        else:
            self.register_buffer("ends", ends)
        if self.learned:
            # sigmoids evenly over [0, 1], which rise as the start does there, and a line
            sharp, place = 100.0, (torch.arange(hidden) + 0.5) / hidden
            slope = torch.lerp(cosine(place)[1], torch.ones(hidden), self.line)
            self.place = nn.Parameter(sharp * place)
            self.log_slope = nn.Parameter(torch.full((hidden,), math.log(sharp)))
            self.log_rise = nn.Parameter((slope / hidden).log())
            self.log_line = nn.Parameter(torch.tensor(math.log(0.1)))
            self.mix = nn.Parameter(torch.tensor(0.0))  # m = sigmoid(mix)

    def forward(self, t):
        """gamma at t (B,) in [0, 1]: (B,)."""
        return self.between(self.rise(t)[0])

    def between(self, u):
        """gamma at the share u (B,) of the way from end to end."""
        return torch.lerp(self.ends[0], self.ends[1], u)

    def rise(self, t):
        """u and du/dt at t (B,): each (B,); u is 0 at t = 0 and 1 at t = 1, to the bit."""
        u, du = self.start(t)
        if self.learned:
            m = self.mix.sigmoid()
            network, d_network = normalised(self.network, t)
            u, du = torch.lerp(u, network, m), torch.lerp(du, d_network, m)
        return u, du

    def start(self, t):
        """The line or the cosine, and its derivative."""
        u, du = normalised(cosine, t)
        return torch.lerp(u, t, self.line), torch.lerp(du, torch.ones_like(t), self.line)

    def network(self, t):
        """The paper's network and its derivative, not yet from 0 to 1."""
        line, slope, rise = self.log_line.exp(), self.log_slope.exp(), self.log_rise.exp()
        unit = (slope * t[:, None] - self.place).sigmoid()  # (B, hidden)
        h = line * t + (rise * unit).sum(1)
        return h, line + (rise * slope * unit * (1 - unit)).sum(1)


def angle(gamma):
    """atan(noise / signal) at a number gamma, as a share of a right angle."""
    return 2 / math.pi * math.atan(math.exp(gamma / 2))


def cosine(t):
    """log of noise / signal, half of gamma, at t (B,) where the angle rises evenly; its slope."""
    low, high = angle(GAMMA_0), angle(GAMMA_1)
    share = low + (high - low) * t
    return (math.pi / 2 * share).tan().log(), (high - low) * math.pi / (math.pi * share).sin()


def normalised(f, t):
    """f's value and derivative at t (B,), moved and scaled so that it goes from 0 to 1."""
    value, slope = f(torch.cat([t, torch.zeros_like(t[:1]), torch.ones_like(t[:1])]))
    span = value[-1] - value[-2]
    return (value[:-2] - value[-2]) / span, slope[:-2] / span


class Plain(nn.Module):
    """The paper's network (appendix B) from the parts of common/unet.py, with the U-Net's call.

    No map is ever halved: `blocks` residual blocks, two in the middle with attention (of one head)
    between them, and blocks + 1 after it, which take up the maps of those before it, the last block
    that of the first convolution. The input is added to the output. The paper's dropout is left
    out.
    """

    def __init__(self, c, channels):
        super().__init__()
        width, dim = c.width, 4 * c.width
        self.fourier = c.fourier
        self.embedding = unet.Embedding(width, dim, c.labels)
        self.first = nn.Conv2d(channels * (1 + 2 * len(c.fourier)), width, 3, padding=1)
        self.down = nn.ModuleList(unet.Block(width, width, dim) for _ in range(c.blocks))
        attention = unet.Attention(width, heads=1)
        self.middle = nn.ModuleList([unet.Stage(unet.Block(width, width, dim), attention),
                                     unet.Stage(unet.Block(width, width, dim), None)])
        self.up = nn.ModuleList(unet.Block(2 * width, width, dim) for _ in range(c.blocks + 1))
        self.last_norm = unet.norm(width)
        self.last = unet.zero(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x, t, label=None):
        e = self.embedding(t, label)
        h = self.first(unet.fourier_input(x, self.fourier))
        skips = [h]
        for block in self.down:
            h = block(h, e)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, e)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), e)
        return x + self.last(self.last_norm(h))


class Model(nn.Module):
    """The network and gamma: one module, so that one EMA and one checkpoint hold both."""

    def __init__(self, net, gamma):
        super().__init__()
        self.net, self.gamma = net, gamma

    def forward(self, x, time, label=None):
        return self.net(x, time, label)


def network(c):
    """U-Net, MLP or the paper's network, and the noise schedule."""
    channels = c.shape[0]
    if c.plain:
        net = unet.fitting(c, lambda: Plain(c, channels)).to(memory_format=torch.channels_last)
    elif len(c.shape) == 3:
        net = unet.build(c, c.shape, channels, fourier=c.fourier)
    else:
        net = unet.build(c, c.shape, channels)
    return Model(net, Gamma(c))


def time_of(gamma):
    """The time in [0, 1] that the network is told: gamma on a scale that never moves."""
    return (gamma - GAMMA_0) / (GAMMA_1 - GAMMA_0)


def onto_levels(x0):
    """What x0 is multiplied by to be x: pictures onto the grid of 256 levels."""
    return 255 / 256 if x0.ndim == 4 else 1.0


def weight(c, gamma):
    """Of a sample's loss, (B,): 1 for the bound itself.

    It is a function of gamma alone, so that in continuous time the shape of gamma(t) does not
    change the mean loss, only its variance (eq. 18).
    """
    return torch.sigmoid(gamma + 2) if c.weight == "sigmoid" else torch.ones_like(gamma)


def visited(c, gamma, t):
    """gamma where the t (B,) in [0, 1) look, and what an error there counts in the bound.

    Returns gamma (B,); the factor of |eps - eps'|^2, (B,); and u, du/dt (B,), through which alone
    gamma's shape is felt in continuous time (eq. 17). With T steps each t is the upper end of its
    T-th part (eq. 14), and there is no third.
    """
    if not c.T:
        u, du = gamma.rise(t)
        return gamma.between(u), (gamma.ends[1] - gamma.ends[0]) * du / 2, (u, du)
    k = (t * c.T).floor()
    gamma_t, gamma_s = gamma((k + 1) / c.T), gamma(k / c.T)
    return gamma_t, c.T / 2 * torch.expm1(gamma_t - gamma_s), ()


def error(c, net, x0, gamma, label, seed, first, step, stream):
    """|eps - eps'(x_t, gamma)|^2 as a mean over each sample's values, (B,).

    eps is drawn by seed, first (the number of the first sample), step and stream.
    """
    signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x_t, eps = add_noise(x0, signal * onto_levels(x0), noise, seed, first, step, stream)
    guess = net(x_t, time_of(gamma), label).to(x_t.dtype)
    if c.predict == "v":
        each = [-1] + [1] * (x0.ndim - 1)
        guess = noise.view(each) * x_t + signal.view(each) * guess
    return (eps - guess).square().flatten(1).mean(1)


def objective(c, net, gamma, x0, t, label, first, number, reach):
    """The loss of an update, and what is logged of it: a scalar, a dict.

    number: which update it is, an int or () int64; reach: of reach_of; t (B,) in [0, 1): where the
    samples look. One backward pass then trains all of it: the network
    by the mean loss; gamma's ends, where they are learned, by the mean bound, with its other two
    terms; gamma's shape by the mean of the squared loss, which is least where the loss varies
    least. d mean(L^2) is d mean(L) with each sample's part times 2 L, and so it is made where the
    shape enters, at u and du/dt (appendix I.2): no gradient of the others passes there. In T steps
    the bound is not the same for every shape, and the shape is trained by the mean too.
    """
    gamma_t, factor, enters = visited(c, gamma, t)
    with flags.autocast(c):
        off = error(c, net, x0, gamma_t, label, c.seed, first, 2 * number, NOISE)
    diffusion = factor * off
    L = weight(c, gamma_t) * diffusion
    twice = 2 * L.detach()  # a hook that held L itself would keep the graph that holds the hook
    for a in enters:
        if a.requires_grad:
            a.register_hook(lambda gradient: twice * gradient)

    gamma_0, gamma_1 = gamma.ends
    eps = randn(x0.shape, c.seed, first, 2 * number + 1, NOISE, device=x0.device)
    latent = latent_kl(onto_levels(x0) * x0, gamma_1).mean()
    recon = reconstruction(x0, gamma_0, eps, reach).mean()
    loss = L.mean()
    if c.ends == "learned":
        loss = loss + latent + recon  # elsewhere constants
    terms = dict(reconstruction=recon, latent=latent, diffusion=diffusion.mean())
    bits = {name: nats / math.log(2) for name, nats in terms.items()}
    ends = dict(gamma_0=gamma_0, gamma_1=gamma_1) if c.ends == "learned" else {}
    return loss, dict(loss=loss, square=L.square().mean()) | bits | ends


def latent_kl(x, gamma_1):
    """KL(q(z_1 | x) || N(0, 1)) in nats per value, (B,)."""
    mean = torch.sigmoid(-gamma_1) * x.square()
    return 0.5 * (mean + torch.sigmoid(gamma_1) - 1 - F.logsigmoid(gamma_1)).flatten(1).mean(1)


def level_of(x0):
    """The level of each value, 0..255, like x0."""
    return ((x0 + 1) * 127.5).round()


def spacing_of(gamma_0):
    """The spacing of the levels, 2/256, in standard deviations of z_0, which is x noised the least.

    z_0 = x + exp(gamma_0 / 2) eps, which the paper multiplies by its signal.
    """
    return 2 / 256 * torch.exp(-gamma_0 / 2)


def reach_of(gamma_0):
    """How many levels on either side weigh more in a reconstruction than fp32 can tell.

    gamma_0: a number. 15 standard deviations of z_0; a gamma_0 that is not finite reaches them all.
    Rounded up to two binary digits, 4, 6, 8, 12, ...: each is a kind of update (gpu.recorded).
    """
    levels = 15 * 128 * math.exp(min(gamma_0, 0.0) / 2)
    if not levels < 255:
        return 255
    unit = 2 ** max(0, math.ceil(levels).bit_length() - 2)
    return min(255, math.ceil(levels / unit) * unit)


def reconstruction(x0, gamma_0, eps, reach):
    """-log p(x | z_0) in nats per value, (B,): p is proportional to q(z_0 | x) over 256 levels.

    eps like x0: the noise of z_0. The logit of a level d places above x's own is d r eps - d^2 r^2
    / 2 more than its own, with r of spacing_of. The sum runs over d from -reach to reach, one at a
    time, so that memory does not grow with them where no gradient is kept. For points p is
    N(z_0, exp(gamma_0)).
    """
    if x0.ndim == 2:
        return 0.5 * (math.log(2 * math.pi) + gamma_0 + eps.square()).mean(1)
    own, r = level_of(x0), spacing_of(gamma_0)
    total = torch.zeros_like(x0)  # log of the sum; d = 0 has a logit of 0
    for d in range(-reach, reach + 1):
        if d != 0:
            logit = d * r * eps - (d * r) ** 2 / 2
            there = (own + d >= 0) & (own + d <= 255)
            total = torch.where(there, torch.logaddexp(total, logit), total)
    return total.flatten(1).mean(1)


def decoded(x0, gamma_0, eps):
    """The level nearest to z_0, like x0."""
    return (level_of(x0) + eps / spacing_of(gamma_0)).round().clamp(0, 255)


def grid(c, gamma, steps):
    """gamma at the steps + 1 places of sampling, from gamma_0 up to gamma_1: float64, on the CPU.

    The network is told gamma alone, so the places are free: even in the angle atan(noise / signal)
    or in gamma, whatever shape it was trained with. A model of T steps knows T gammas: then the
    nearest of these to each place, all different. ValueError for more steps than T.
    """
    low, high = gamma.ends.tolist()
    i = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if c.spacing == "cosine":
        share = angle(low) + (angle(high) - angle(low)) * i
        places = 2 * (math.pi / 2 * share).tan().log()
    else:
        places = low + (high - low) * i
    if not c.T:
        return places
    if steps > c.T:
        raise ValueError(f"--steps {steps}: this model has T = {c.T}, so choose from 1 to {c.T}")
    known = gamma(torch.linspace(0, 1, c.T + 1, device=gamma.ends.device)).cpu().double()
    nearest = 1 + (places[1:, None] - known[1:]).abs().argmin(1)
    k = torch.arange(1, steps + 1)
    rising = (nearest - k).cummax(0).values + k  # each at least one above the last
    rising = torch.minimum(rising, c.T - steps + k)  # and room for those to come
    return known[torch.cat([torch.zeros(1, dtype=torch.long), rising])]


def walk(c, places):
    """Coefficients of the steps down a grid of gamma (rising, float64 (K + 1,)): float32 (K, 5).

    p_x, p_out, c_x, c_0, c_n of the update in this file's head. q(x_s | x_t, x), eq. 9, with
    share = -expm1(gamma_s - gamma_t), which does not cancel; or with --flow no noise and the eps'
    that belongs to x': x_s = signal_s x' + noise_s (x_t - signal_t x') / noise_t.
    """
    gamma_s, gamma_t = places[:-1], places[1:]
    signal_s, noise_s = torch.sigmoid(-gamma_s).sqrt(), torch.sigmoid(gamma_s).sqrt()
    signal_t, noise_t = torch.sigmoid(-gamma_t).sqrt(), torch.sigmoid(gamma_t).sqrt()
    p_x, p_out = prediction(c.predict, signal_t ** 2, None)
    if c.flow:
        c_x, c_n = noise_s / noise_t, torch.zeros_like(gamma_t)
        c_0 = signal_s - signal_t * c_x
    else:
        share = -torch.expm1(gamma_s - gamma_t)
        c_x = signal_s / signal_t * torch.exp(gamma_s - gamma_t)
        c_0, c_n = signal_s * share, noise_s * share.sqrt()
    return torch.stack([p_x, p_out, c_x, c_0, c_n], 1).float()


# =========================================================================================== Sample
def few(c):
    """Steps where none are asked for."""
    return min(50, c.T or 50)


@torch.no_grad()
def sample(c, net, first, n, steps=None, label=None, frames=None):
    """From gamma_1 down to gamma_0 in `steps` steps: samples first .. first + n - 1 of c.seed.

    label: int64 (n,) or None; frames: a list that receives each step's x0'. Returns (n, *c.shape),
    about in [-1, 1]; of a picture the nearest of 256 levels counts. Of c are read T and predict, as
    the model has them; shape, labels, device, precision; and seed, guidance, spacing, flow, clip.
    """
    steps = steps or few(c)
    places = grid(c, net.gamma, steps)
    table = walk(c, places).to(c.device)
    signal_0 = torch.sigmoid(-places[0]).sqrt().item()
    gamma = places.float().to(c.device)
    number = torch.arange(steps + 1, device=c.device)  # of a step, counted from the data
    which = torch.arange(first, first + n, device=c.device)
    seed = torch.tensor(c.seed, device=c.device)
    down = sampling.captured(denoise, c, net)  # on CUDA a graph, replayed
    x = randn((n, *c.shape), c.seed, first, stream=START, device=c.device)  # at t = 1
    back = 1 / onto_levels(x)  # from the levels to [-1, 1]
    for i in progress(range(steps)[::-1], f"samples {first} to {first + n - 1}"):
        x, x_ = down(x, gamma[i + 1:i + 2], table[i], number[i + 1], seed, which, label)
        if frames is not None:
            frames.append(back * x_.cpu())
    return back / signal_0 * x


def denoise(c, net, x, gamma, row, number, seed, which, label):
    """From x_t to x_s, and x' on the way: the last two lines of this file's head, in one pass.

    gamma (1,): at t; row (5,): the step's coefficients; number (), seed () and which (n,): what eps
    is drawn by.
    """
    given, without = dict(label=label), dict(label=c.labels)
    out, out_uncond = sampling.guided(c, net, x, time_of(gamma), given, without)
    return denoise_step(x, out, row, seed, which, number, STEP, out_uncond=out_uncond,
                        guidance=c.guidance, clip=c.clip and x.ndim == 4, return_x0=True)


# ============================================================================================ Train
def train(c):
    """The bound at one t for each sample; the t lie evenly in each batch (appendix I.1)."""
    check(c)
    data = runs.begin(c)  # sets c.shape, c.labels and the seed
    net = network(c).to(c.device)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.AdamW(groups(net), c.lr, (0.9, 0.99), weight_decay=c.weight_decay,
                                  **gpu.adam(c.device))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net
    untrained = curve(Gamma(c))

    def update(x0, label, first, t, number, reach):
        """What an update computes, of tensors.

        t (b,) in [0, 1): where the samples look; first: the number of the first one; number: of the
        update, (); reach: of reach_of.
        """
        loss, told = objective(c, f, net.gamma, x0, t, label, first, number, reach)

        # One step of Adam
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(net)
        optimizer.step()
        ema.update(net)
        return told

    update = gpu.recorded(update, c)  # with --graph a CUDA graph

    for step in run:
        # Data and times: a tenth of the labels is dropped, for guidance
        x0, label, first = run.batch(step, drop=0.1)  # first: number of its first sample
        t = run.spread(step)
        # where gamma_0 is learned the GPU is waited for here
        reach = reach_of(net.gamma.ends[0].item() if c.ends == "learned" else GAMMA_0)
        runs.set_rate(optimizer, c.lr * min(1, step / max(1, c.warmup)))

        # One update
        run.log(**update(x0, label, first, t, gpu.number(step, c.device), reach))
        n = run.shows(20)  # from time to time a sheet of what it draws by now, in 20 steps
        if n:
            run.show(sample(c, ema.net, 0, n, min(20, c.T or 20), sample_labels(c, n)))
    runs.end(c, run, c.steps or few(c))
    draw_gamma(c, untrained, curve(ema.net.gamma))


def groups(net):
    """The optimizer's: the network; gamma's shape at half its rate, its ends at a tenth of it."""
    shape = [p for name, p in net.gamma.named_parameters() if name != "ends"]
    ends = [p for name, p in net.gamma.named_parameters() if name == "ends"]
    return [dict(params=runs.learnable(net.net)), dict(params=shape, scale=0.5, weight_decay=0.0),
            dict(params=ends, scale=0.1, weight_decay=0.0)]


@torch.no_grad()
def curve(gamma):
    """gamma at 301 t from 0 to 1, as numbers."""
    return gamma(torch.linspace(0, 1, 301, device=gamma.ends.device)).tolist()


def draw_gamma(c, untrained, now):
    """gamma.png in the run: the schedule without training, and as it is now."""
    with inputs():
        pictures.lines(c.run / "gamma.png", torch.linspace(0, 1, 301).tolist(),
                       {"untrained": untrained, "now": now}, "t", "gamma")


# ========================================================================================= Evaluate
@torch.no_grad()
def bits_per_dim(c, net, data, T=None, n=500, parts=16):
    """The bound on n held-out samples at most (eq. 11), in bits per dimension: dict, bits (m, 3).

    The dict has the mean, its standard error over the samples, the three terms, and for pictures
    the share of values whose nearest level to z_0 is another one, beside what it should be. bits
    are each sample's terms, means over `parts` draws of the noise: one t in each of as many equal
    strata. In continuous time gamma runs evenly from end to end, since the bound knows no shape
    (eq. 18); with T steps (default the model's) it is the model's own. Always in fp32.
    """
    c = copy.copy(c)
    c.T = c.T if T is None else T
    gamma = net.gamma
    if not c.T:
        c.gamma = "linear"
        gamma = Gamma(c).to(c.device)
        gamma.ends = net.gamma.ends
    gamma_0, gamma_1 = net.gamma.ends
    reach = reach_of(gamma_0.item())
    wrong = values = outermost = 0
    bits = []
    chosen = metrics.choice(len(data), n)
    for first in progress(range(0, len(chosen), 32), "bits/dim"):
        x0, label = data.batch(chosen[first:first + 32], c.device)
        label = torch.where(label < 0, c.labels, label) if c.conditional else None
        recon = diffusion = 0
        t = draws.strata(parts, len(x0), draws.generator(c.seed, JUDGE, first)).float()
        for k in range(parts):
            eps = randn(x0.shape, c.seed, first, 2 * k + 1, JUDGE, device=c.device)
            recon = recon + reconstruction(x0, gamma_0, eps, reach)
            gamma_t, factor, _ = visited(c, gamma, t[k].to(c.device))
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                off = error(c, net, x0, gamma_t, label, c.seed, first, 2 * k, JUDGE)
            diffusion = diffusion + factor * off
            if x0.ndim == 4:
                wrong += (decoded(x0, gamma_0, eps) != level_of(x0)).sum().item()
                values += x0.numel()
                outermost += (x0.abs() == 1).sum().item()
        latent = latent_kl(onto_levels(x0) * x0, gamma_1)
        terms = torch.stack([recon / parts, latent, diffusion / parts], 1)
        bits.append(terms.cpu().double() / math.log(2))
    bits = torch.cat(bits)
    total = bits.sum(1)
    result = {"bits/dim": total.mean().item()}
    if len(total) > 1:
        result["bits/dim +-"] = (total.std() / len(total) ** 0.5).item()
    for name, mean in zip(TERMS, bits.mean(0).tolist()):
        result[name] = mean
    if values:
        # farther than half of the spacing on either side; the outermost levels have one
        half = spacing_of(gamma_0.cpu().double()) / 2
        tail = torch.special.ndtr(-half).item()
        result["decoded wrongly"] = wrong / values
        result["by its formula"] = tail * (2 - outermost / values)
    return result, bits


def judge_bits(c, net, T):
    """What --evaluate says of bits: a dict. Each sample's go to bits.csv in the run.

    The model's own bound; and where T is another, which a model of continuous time allows, that in
    T steps too.
    """
    data = runs.load_data(c, "test")
    result, bits = bits_per_dim(c, net, data)
    if T != c.T:
        discrete, _ = bits_per_dim(c, net, data, T)
        told = {name: discrete[name] for name in ("bits/dim", "bits/dim +-", "diffusion")}
        result |= {f"{name}, T = {T}": value for name, value in told.items()}
    rows = ["number,label,bits/dim," + ",".join(TERMS)]
    for i, terms in zip(metrics.choice(len(data), len(bits)).tolist(), bits.tolist()):
        numbers = [f"{x:.6g}" for x in (sum(terms), *terms)]
        rows.append(",".join([str(i), str(data.labels[i].item()), *numbers]))
    with inputs(), written(c.run / "bits.csv") as file:
        file.write_text("\n".join(rows) + "\n")
    return result


# ============================================================================================= Main
def check(c):
    """Stop for what the flags together cannot mean."""
    if c.ends == "learned" and c.name in POINTS:
        stop(f"--ends learned is for pictures, and {c.name} has points: without levels the bound "
             "falls for ever as gamma(0) does")
    if c.ends == "learned" and c.weight != "bound":
        stop("--ends learned needs --weight bound, since only the bound knows where they should "
             "be: give that, or --ends fixed")
    idle = sorted(c.given & {"multipliers", "attention", "heads", "resample"})
    if c.plain and idle:
        stop(f"--{idle[0]} does nothing with --plain: leave it out, or give --no-plain")


def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16, steps=20) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", flow=True. main has parsed them.
    """
    if "T" in given:
        raise ValueError("T is for bits_per_dim to take: load has no use for it")
    c = parsed or flags.settings("vdm", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c)
    return c, runs.restored(c, network(c), saved)


def main():
    c = flags.parse("vdm", FLAGS, RECIPES, __doc__)
    asked = c.T
    if c.train:
        train(c)
    if not (c.sample or c.evaluate):
        return
    T_given = "T" in c.given
    c, net = load(parsed=c)
    T = asked if T_given else c.T
    if c.T not in (0, T):
        stop(f"--T {T}: this model was trained in {c.T} steps: leave it out")
    steps = c.steps or few(c)
    if c.sample:
        draw = sampling.Draw(c, c.sheet, c.label)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label, draw.frames))
        draw.save(steps)
    if c.evaluate:
        metrics.prepare(c)
        draw = sampling.Draw(c, c.n or 1000)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label))
        result = metrics.judge(c, draw, steps)
        metrics.write_result(c, judge_bits(c, net, T) | result)


if __name__ == "__main__":
    main()
