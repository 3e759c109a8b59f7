"""DDPM: denoising diffusion probabilistic models.
Ho, Jain, Abbeel 2020 (arXiv:2006.11239), improved by Nichol, Dhariwal 2021 (arXiv:2102.09672).

    noising    x_t = signal_t x0 + noise_t eps    signal^2 = alpha_bar = 1 - noise^2  (4)
    training   | target - net(x_t, t) |^2         target: eps, x0, v or the mean      (14)
    sampling   x0' = p_x x_t + p_out net(x_t, t)  clipped to [-1, 1]                  (15)
               x_s = c_x x_t + c_0 x0' + c_n eps  s < t, the next step down           (7)

    python ddpm.py --train                        # digits, drawn on the spot
    python ddpm.py --sample --steps 50 --n 16     # a sheet in runs/ddpm-digits/samples.png
    python ddpm.py --evaluate                     # FCD, precision, recall, ..., bits/dim
    python ddpm.py --train --sample --data cifar10 --variance learned

Digits on two cores of a Xeon: 2.5 minutes, FCD 1.0 (floor 0.16) at 50 of 1000 steps, one run.
"""
import math
from dataclasses import dataclass

from common import early  # noqa: F401  first, since torch takes seconds
import torch
import torch.nn.functional as F

from common import draws, flags, gpu, metrics, processes, runs, sampling, unet
from common.draws import JUDGE, NOISE, START, STEP, sample_labels
from common.flags import option
from common.progress import progress
from common.schedules import SCHEDULES, alpha_bar, at, before, posterior, prediction, timesteps
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================ Flags
@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    T: int = option(1000, "steps from data to noise", low=2, high=10 ** 7, of_model=True)
    schedule: str = option("cosine", "how alpha_bar falls from 1 to about 0", choices=SCHEDULES,
                           of_model=True)
    predict: str = option("v", "what the network's output is", choices=("eps", "x0", "mean", "v"),
                          of_model=True, fp32=("mean",))
    variance: str = option("beta", "of a reverse step; learned: between the other two (L_hybrid)",
                           choices=("beta", "beta-tilde", "learned"), of_model=True)
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    steps: int = option(0, "network evaluations; default T, and at most 50 for --evaluate",
                        "sample evaluate", low=1, high="T")


FLAGS = (Config, flags.Unet, flags.Training, flags.Labels, flags.Guidance)

RECIPES = {  # by data set: "" is all of them, "pictures" any path; each is laid over those above
    "": dict(width=64, multipliers=(1, 2, 2), blocks=1, attention=(16, 8), heads=4, batch=64,
             lr=5e-4, ema=0.9995, iters=100_000),
    "mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "fashion-mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "cifar10": dict(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), batch=128,
                    lr=2e-4, warmup=5000, ema=0.9999, iters=500_000, flip=True,
                    schedule="linear", predict="eps"),  # Ho 2020, appendix B
    "pictures": dict(flip=True),
    # without a GPU what is above is hours; what is below knows a laptop
    "cpu": dict(width=32, multipliers=(1, 2, 2), blocks=1, attention=(), batch=32, lr=1e-3,
                ema=0.999, warmup=100, iters=100_000, minutes=10),
    "digits": dict(width=32, attention=(), batch=64, lr=2e-3, ema=0.995, iters=3000,
                   minutes=2.5),
    "stacked": dict(width=64, attention=(8,), batch=64, lr=1e-3, ema=0.999, iters=20_000,
                    minutes=0),
    "swirl": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0),
    "gaussians": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0),
}

# ========================================================================================= Notation
# x0 (B, C, H, W) data in [-1, 1], or (B, 2);  x0' (in code x0_) what is predicted;  t (B,) in 1..T
# eps ~ N(0, 1);  signal, noise (T + 1,): sqrt(alpha_bar), sqrt(1 - alpha_bar);  tau: steps visited
# s < t: the next step down, t - 1 where all are visited;  guess: what the network says of x_t
# v = signal eps - noise x0 is a target;  nu in [-1, 1] is where a learned variance lies


# ======================================================================================= The method
def network(c):
    """Twice the channels out where the variance is learned: the second half is nu."""
    return unet.build(c, c.shape, c.shape[0] * (2 if c.variance == "learned" else 1))


def split(c, out):
    """The network's output as what --predict says, (B, C, ...), and nu or None."""
    return out.float().chunk(2, 1) if c.variance == "learned" else (out, None)


def walk(c, tau):
    """Coefficients of the reverse steps over tau (rising, ending at T): float32 (K, 7).

    p_x, p_out, c_x, c_0, c_n of the update in this file's head; log beta, log beta-tilde.
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, before(tau)
    c_x, c_0, beta, beta_tilde = posterior(ab[t], ab[s])
    # beta-tilde is 0 where s = 0, and its log is needed: the next one's instead (Nichol 2021)
    beta_tilde[0] = beta_tilde[1] if len(tau) > 1 else beta[0]
    c_n = (beta if c.variance == "beta" else beta_tilde).sqrt()
    c_n[0] = 0  # clean data are not noised again
    p_x, p_out = prediction(c.predict, ab[t], ab[t - 1])
    columns = [p_x, p_out, c_x, c_0, c_n, beta.log(), beta_tilde.log()]
    return torch.stack(columns, 1).float()


def objective(c, out, x0, x_t, eps, t, signal, noise, table):
    """L_simple (eq. 14); L_hybrid with a learned variance (Nichol 2021, eq. 16). A scalar.

    signal, noise: (B, 1, ...), at t; table: of walk over all of 1..T.
    """
    guess, nu = split(c, out.float())
    if c.predict == "mean":
        # eq. 7, weighted as in the bound, eq. 8: unweighted it is unstable (Ho 2020, table 2)
        _, _, c_x, c_0, _, log_beta, _ = at(table, t - 1, x0)
        mean = c_x * x_t + c_0 * x0
        simple = ((mean - guess) ** 2 / (2 * log_beta.exp())).mean()
    else:
        target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[c.predict]
        simple = F.mse_loss(guess, target)
    if nu is None:
        return simple
    stopped = torch.cat([guess.detach(), nu], 1)  # the bound teaches the variance only
    return simple + c.T / 1000 * bound(c, stopped, x0, x_t, t, table).mean()


def bound(c, out, x0, x_t, t, table):
    """L_{t-1} of each sample, for t = 1 the reconstruction of 256 levels (eq. 5, 8, 13).

    In bits per dimension, (B,). x0' is clipped, as in sampling.
    """
    guess, nu = split(c, out)
    p_x, p_out, c_x, c_0, _, log_beta, log_tilde = at(table, t - 1, x0)
    x0_ = (p_x * x_t + p_out * guess).clamp(-1, 1)
    mean_q = c_x * x_t + c_0 * x0
    mean_p = c_x * x_t + c_0 * x0_
    log_var = log_variance(c, log_beta, log_tilde, nu).expand_as(x0)
    ratio = (log_tilde - log_var).exp()
    kl = 0.5 * (log_var - log_tilde - 1 + ratio + (mean_q - mean_p) ** 2 * (-log_var).exp())
    nll = -discretised_gaussian(x0, mean_p, 0.5 * log_var)
    first = (t == 1).view_as(log_beta)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def log_variance(c, log_beta, log_tilde, nu):
    """Of the reverse step: Ho 2020's two choices, or between them by nu (Nichol 2021, eq. 15)."""
    if c.variance == "learned":
        w = (nu + 1) / 2
        return w * log_beta + (1 - w) * log_tilde
    return log_beta if c.variance == "beta" else log_tilde


def discretised_gaussian(x, mean, log_std):
    """log of the Gaussian's mass on the level of x, one of 256 in [-1, 1] (eq. 13)."""
    d = x - mean
    per_std = (-log_std).exp()
    # above the mean the level is mirrored to below it, where no difference is one of two ones
    upper = torch.special.log_ndtr((1 / 255 - d.abs()) * per_std)
    lower = torch.special.log_ndtr((-1 / 255 - d.abs()) * per_std)
    inner = upper + torch.log(-torch.expm1(lower - upper))
    outermost = torch.special.log_ndtr((1 / 255 - d * x.sign()) * per_std)  # reaches to infinity
    return torch.where(x.abs() > 0.999, outermost, inner)


# =========================================================================================== Sample
def few(c):
    """Steps where none are asked for: all T would take minutes."""
    return min(50, c.T)


@torch.no_grad()
def sample(c, net, first, n, steps=None, label=None, frames=None):
    """Algorithm 2 over `steps` of the T steps: samples first .. first + n - 1 of c.seed.

    label: int64 (n,) or None; frames: a list that receives each step's x0'. Returns (n, *c.shape),
    about in [-1, 1]. Of c are read T, schedule, predict and variance, as the model has them; shape,
    labels, device, precision; and seed, guidance.
    """
    steps = steps or few(c)
    tau = timesteps(c.T, steps)
    table = walk(c, tau).to(c.device)
    tau = tau.to(c.device)
    which = torch.arange(first, first + n, device=c.device)
    seed = torch.tensor(c.seed, device=c.device)
    down = sampling.captured(denoise, c, net)  # on CUDA a graph, replayed
    x = randn((n, *c.shape), c.seed, first, stream=START, device=c.device)  # x_T
    for i in progress(range(steps)[::-1], f"samples {first} to {first + n - 1}"):
        x, x0_ = down(x, tau[i:i + 1], table[i], seed, which, label)
        if frames is not None:
            frames.append(x0_.cpu())
    return x


def denoise(c, net, x, t, row, seed, which, label):
    """From x_t to x_s, and x0' on the way: the last two lines of this file's head, in one pass.

    t (1,): the step; row (7,): its coefficients; seed () and which (n,): what eps is drawn by.
    """
    given, without = dict(label=label), dict(label=c.labels)
    out, out_uncond = sampling.guided(c, net, x, t / c.T, given, without)
    guess, nu = split(c, out)
    std = None  # the row's own c_n, the same for every value
    if nu is not None:
        log_var = log_variance(c, row[5], row[6], nu)
        std = (0.5 * log_var).exp() * (row[4] > 0)  # no noise on the last step
        out_uncond = None if out_uncond is None else split(c, out_uncond)[0]
    return denoise_step(x, guess, row[:5], seed, which, t[0], STEP, out_uncond=out_uncond,
                        guidance=c.guidance, clip=x.ndim == 4, std=std, return_x0=True)


# ============================================================================================ Train
def train(c):
    """Algorithm 1."""
    data = runs.begin(c)  # sets c.shape, c.labels and the seed
    net = network(c).to(c.device)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(runs.learnable(net), c.lr, **gpu.adam(c.device))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net

    ab = alpha_bar(c.schedule, c.T)
    signal = ab.sqrt().float().to(c.device)
    noise = (1 - ab).sqrt().float().to(c.device)
    table = walk(c, torch.arange(1, c.T + 1)).to(c.device)

    def update(x0, label, first, t, number):
        """What an update computes, of tensors.

        t (b,): each sample's step; first: the number of the first one; number: of the update, ().
        """
        # Noised data
        x_t, eps = add_noise(x0, signal[t], noise[t], c.seed, first, number, NOISE)

        # The network's guess, and how far it is off
        with flags.autocast(c):
            out = f(x_t, t / c.T, label)
        loss = objective(c, out, x0, x_t, eps, t, at(signal, t, x0), at(noise, t, x0), table)

        # One step of Adam
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(net)
        optimizer.step()
        ema.update(net)
        return dict(loss=loss)

    update = gpu.recorded(update, c)  # with --graph a CUDA graph

    for step in run:
        # Data and times: a tenth of the labels is dropped, for guidance
        x0, label, first = run.batch(step, drop=0.1)  # first: number of its first sample
        t = 1 + (run.spread(step) * c.T).long()  # each of 1..T as often as any other
        runs.set_rate(optimizer, c.lr * min(1, step / max(1, c.warmup)))

        # One update
        run.log(**update(x0, label, first, t, gpu.number(step, c.device)))
        n = run.shows(20)  # from time to time a sheet of what it draws by now, in 20 steps
        if n:
            run.show(sample(c, ema.net, 0, n, min(20, c.T), sample_labels(c, n)))
    runs.end(c, run, c.steps or few(c))


# ========================================================================================= Evaluate
@torch.no_grad()
def bits_per_dim(c, net, data, n=500, parts=16):
    """Bits per dimension of n held-out pictures at most (eq. 5): mean and its standard error.

    The terms of t = 1 and of L_T are computed for each picture; of those between, one t in each of
    `parts` equal strata stand for all: unbiased.
    """
    chosen = metrics.choice(len(data), n)
    ab = alpha_bar(c.schedule, c.T)
    signal = ab.sqrt().float().to(c.device)
    noise = (1 - ab).sqrt().float().to(c.device)
    table = walk(c, torch.arange(1, c.T + 1)).to(c.device)
    total = []
    for first in progress(range(0, len(chosen), 32), "bits/dim"):
        x0, label = data.batch(chosen[first:first + 32], c.device)
        label = torch.where(label < 0, c.labels, label) if c.conditional else None

        # L_T = KL(q(x_T | x0) || N(0, 1))
        left = ab[c.T] * x0.cpu().double() ** 2
        prior = 0.5 * (left - ab[c.T] - torch.log1p(-ab[c.T]))
        bits = prior.flatten(1).mean(1) / math.log(2)

        # L_0, at t = 1, and one t of 2..T from each stratum
        u = draws.strata(parts, len(x0), draws.generator(c.seed, JUDGE, first))
        between = 2 + (u * (c.T - 1)).long()
        visited = torch.cat([torch.ones_like(between[:1]), between]).to(c.device)
        for k, t in enumerate(visited):
            x_t, _ = add_noise(x0, signal[t], noise[t], c.seed, first, k, JUDGE)
            with flags.autocast(c):
                out = net(x_t, t / c.T, label)
            weight = 1 if k == 0 else (c.T - 1) / parts
            bits += weight * bound(c, out, x0, x_t, t, table).cpu().double()
        total.append(bits)
    total = torch.cat(total)
    return total.mean().item(), (total.std() / len(total) ** 0.5).item()


# ============================================================================================= Main
def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16, steps=20) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", guidance=2. main has parsed them.
    """
    c = parsed or flags.settings("ddpm", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c)
    return c, runs.restored(c, network(c), saved)


def main():
    c = flags.parse("ddpm", FLAGS, RECIPES, __doc__)
    asked = c.sample
    if c.train:
        train(c)
    if not (c.sample or c.evaluate):
        return
    c, net = load(parsed=c)
    if c.sample:
        steps = c.steps or (c.T if asked else few(c))
        draw = sampling.Draw(c, c.sheet, c.label)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label, draw.frames))
        draw.save(steps)
    if c.evaluate:
        metrics.prepare(c)
        steps = c.steps or few(c)
        draw = sampling.Draw(c, c.n or 1000)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label))
        result = metrics.judge(c, draw, steps)
        if len(c.shape) == 3:
            bits, error = bits_per_dim(c, net, runs.load_data(c, "test"))
            result |= {"bits/dim": bits, "bits/dim +-": error}
        metrics.write_result(c, result)


if __name__ == "__main__":
    main()
