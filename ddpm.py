"""DDPM: denoising diffusion probabilistic models.
Ho, Jain, Abbeel 2020 (arXiv:2006.11239), with the improvements of Nichol, Dhariwal 2021 (arXiv:2102.09672).

    python ddpm.py --train                          # digits, drawn on the spot
    python ddpm.py --sample --steps 50 --n 16       # a sheet in runs/ddpm-digits/samples.png
    python ddpm.py --evaluate                       # FCD, precision, recall, ..., bits/dim
    python ddpm.py --train --sample --data cifar10 --variance learned

Digits on two cores of a Xeon without a GPU: 2.5 minutes of training, FCD 1.0 (floor 0.16) at 50 of 1000 steps, one run.
"""
import math
from dataclasses import dataclass

import torch

from common import metrics, pictures, runs
from common.runs import JUDGE, NOISE, START, STEP, option
from common.schedules import SCHEDULES, alpha_bar, posterior, prediction, timesteps
from common.unet import MLP, UNet
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================================ Config
@dataclass
class Config:
    """This script's own flags; common/runs.py has the shared ones, and RECIPES what a data set changes."""
    T: int = option(1000, "steps from data to noise", low=2)
    schedule: str = option("cosine", "how alpha_bar falls from 1 to about 0", choices=SCHEDULES)
    predict: str = option("v", "what the network's output means", choices=("eps", "x0", "mean", "v"))
    variance: str = option("beta", "of the reverse step: beta, beta-tilde, or learned between the two (L_hybrid)",
                           choices=("beta", "beta-tilde", "learned"))
    conditional: bool = option(False, "train on class labels too, a tenth of them dropped for guidance")
    steps: int = option(0, "network evaluations, 1 to T; default T, and at most 50 for --evaluate", "sample evaluate", low=1)
    label: int = option(-1, "draw only this class; default each in turn", "sample", low=0)
    guidance: float = option(1.0, "classifier-free guidance: eps + (w - 1)(eps - eps without label)", "sample evaluate", low=0)

    width: int = option(64, "channels at full resolution", low=1)
    multipliers: tuple = option((1, 2, 2), "of the width, one for each level of the U-Net", low=1)
    blocks: int = option(1, "residual blocks a level", low=1)
    attention: tuple = option((16, 8), "sides of the maps that attend, where there are such; none: ''", low=1)
    heads: int = option(4, "attention heads", low=1, needs="attention")
    resample: str = option("conv", "between levels", choices=("conv", "biggan"))

    iters: int = option(100_000, "updates in all", low=1)
    minutes: float = option(0.0, "minutes of training in all; 0: no limit", low=0)
    batch: int = option(64, "pictures in an update", low=1)
    lr: float = option(5e-4, "learning rate of Adam", above=0)
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    ema: float = option(0.9995, "decay of the mean of the weights that samples are drawn with", low=0, high=0.999999)
    flip: bool = option(False, "mirror half of the pictures")


RECIPES = {  # what differs from Config, by data set; `pictures` is any path
    "digits": dict(width=32, attention=(), lr=2e-3, ema=0.995, iters=3000, minutes=2.5),
    "stacked": dict(attention=(8,), lr=1e-3, ema=0.999, iters=20_000),
    "swirl": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000),
    "gaussians": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000),
    "mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "fashion-mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "cifar10": dict(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), batch=128, lr=2e-4, warmup=5000, ema=0.9999,
                    iters=500_000, flip=True, schedule="linear", predict="eps"),  # Ho 2020, appendix B
    "pictures": dict(flip=True),
}

# ========================================================================================================== Notation
# x0 (B, C, H, W) data in [-1, 1];  t (B,) in 1..T;  eps (B, C, H, W) noise;  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps
# s < t: the step after t on the way back, t - 1 when every step is visited


# ======================================================================================================== The method
def network(c, shape):
    """The network for data of this shape, (C, H, W) or (2,): twice the channels out where the variance is learned."""
    outputs = shape[0] * (2 if c.variance == "learned" else 1)
    if len(shape) == 1:
        return MLP(shape[0], outputs, c.width, classes=c.labels)
    return UNet(shape[0], outputs, shape[-1], c.width, c.multipliers, c.blocks, c.attention, c.heads, c.labels,
                resample=c.resample).to(memory_format=torch.channels_last)  # spares a copy at each convolution


def loss(c, out, x0, x_t, eps, a, s, t, tables):
    """L_simple of the network's output, or the bound's own weights for the mean; L_hybrid with a learned variance. A scalar.

    out: float32, (B, C, ...) or (B, 2 C, ...) with the variance; a, s (B, 1, ...): x_t = a x0 + s eps; tables: of step_tables.
    """
    mean, v = out.chunk(2, 1) if c.variance == "learned" else (out, None)
    if c.predict == "mean":  # eq. 7, and its error as in the bound, eq. 8: unweighted it is unstable (Ho 2020, table 2)
        c_x, c_0, beta = (row[t].view_as(a) for row in tables[:3])
        simple = ((c_x * x_t + c_0 * x0 - mean) ** 2 / (2 * beta)).mean()
    else:  # eq. 14; v: Salimans, Ho 2022
        simple = ({"eps": eps, "x0": x0, "v": a * eps - s * x0}[c.predict] - mean).square().mean()
    if v is None:
        return simple
    stopped = torch.cat([mean.detach(), v], 1)  # the bound teaches the variance only (Nichol 2021, eq. 16)
    return simple + c.T / 1000 * bound(c, x0, x_t, stopped, t, tables).mean()


def bound(c, x0, x_t, out, t, tables):
    """L_{t-1} of each sample, for t = 1 the reconstruction of 256 levels, in bits per dimension (B,). Equations 5, 8 and 13.

    tables: c_x, c_0, beta, beta_tilde (1..T, index 0 unused), p_x, p_out of `prediction`. x0 is clipped where it is predicted.
    """
    c_x, c_0, beta, beta_tilde, p_x, p_out = (row[t].view(-1, *[1] * (x0.ndim - 1)) for row in tables)
    out, v = out.chunk(2, 1) if c.variance == "learned" else (out, None)
    mean = c_x * x_t + c_0 * (p_x * x_t + p_out * out).clamp(-1, 1)
    log_var = log_variance(c.variance, beta, beta_tilde, v).expand_as(x0)
    kl = 0.5 * (log_var - beta_tilde.log() - 1 + (beta_tilde.log() - log_var).exp()
                + (c_x * x_t + c_0 * x0 - mean) ** 2 * (-log_var).exp())
    nll = -discretised_gaussian(x0, mean, 0.5 * log_var)
    return torch.where((t == 1).view_as(beta), nll, kl).flatten(1).mean(1) / math.log(2)


def log_variance(kind, beta, beta_tilde, v=None):
    """Of the reverse step: one of Ho 2020's two, or between them in logs by the network's v in [-1, 1] (Nichol 2021, eq. 15)."""
    if kind == "learned":
        v = (v + 1) / 2
        return v * beta.log() + (1 - v) * beta_tilde.log()
    return (beta if kind == "beta" else beta_tilde).log()


def discretised_gaussian(x, mean, log_std):
    """log of the Gaussian's mass on the level of x, one of 256 in [-1, 1]; the outermost reach to infinity (eq. 13)."""
    d, per_std = x - mean, (-log_std).exp()
    upper = torch.special.log_ndtr((1 / 255 - d.abs()) * per_std)  # of the mirrored level below the mean: no 1 - 1
    lower = torch.special.log_ndtr((-1 / 255 - d.abs()) * per_std)
    outermost = torch.special.log_ndtr((1 / 255 - d * x.sign()) * per_std)
    return torch.where(x.abs() > 0.999, outermost, upper + torch.log(-torch.expm1(lower - upper)))


def step_tables(c, tau):
    """c_x, c_0, beta, beta_tilde, p_x, p_out of the walk over tau (rising, ending at T), read at t: float32 (6, T + 1)."""
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, torch.cat([torch.zeros(1, dtype=torch.long), tau[:-1]])
    c_x, c_0, beta, beta_tilde = posterior(ab[t], ab[s])
    beta_tilde[0] = beta_tilde[1] if len(tau) > 1 else beta[0]  # instead of 0, whose log is needed (Nichol 2021)
    p_x, p_out = prediction(c.predict, ab[t], ab[t - 1])
    tables = torch.full((6, c.T + 1), float("nan"), dtype=torch.float64)
    tables[:, t] = torch.stack([c_x, c_0, beta, beta_tilde, p_x, p_out])
    return tables.float()


# ============================================================================================================ Sample
@torch.no_grad()
def sample(c, net, shape, first, n, steps, label=None, frames=None):
    """Draw samples first .. first + n - 1 of c.seed with exactly `steps` network evaluations (algorithm 2, strided).

    label: (n,) int64 or None; frames: a list that receives x0 as predicted at each step. Returns (n, *shape).
    """
    tables, tau = step_tables(c, tau := timesteps(c.T, steps)).T.to(c.device), tau.to(c.device)
    x = randn((n, *shape), c.seed, first, stream=START, device=c.device)  # x_T
    index, seed = torch.arange(first, first + n, device=c.device), torch.tensor(c.seed, device=c.device)
    for t in runs.progress(tau.flip(0)[:, None], f"samples {first} to {first + n - 1}"):
        x, x0 = runs.replayed(c, step, net, x, t, tables, tau[0], seed, index, label)
        if frames is not None:
            frames.append(x0.cpu())
    return x.clone()  # a graph's own result would change with its next replay


def step(c, net, x, t, tables, last, seed, index, label):
    """From x_t to x_s, and x0 as predicted. t (1,); last (): the t after which data come; seed (), index (n,): which samples; on x's device."""
    with runs.autocast(c):
        out, out_uncond = guided(c, net, x, t, label)
    c_x, c_0, beta, beta_tilde, p_x, p_out = tables[t][0]
    v = None
    if c.variance == "learned":
        (out, v), out_uncond = out.float().chunk(2, 1), out_uncond if out_uncond is None else out_uncond.chunk(2, 1)[0]
    sigma = (0.5 * log_variance(c.variance, beta, beta_tilde, v)).exp() * (t[0] > last)  # no noise on the last step
    coef = torch.stack([p_x, p_out, c_x, c_0, sigma if v is None else torch.zeros_like(c_x)])
    return denoise_step(x, out, coef, seed, index, t[0], STEP, out_uncond=out_uncond, guidance=c.guidance,
                        clip=x.ndim == 4, std=None if v is None else sigma, return_x0=True)


def guided(c, net, x, t, label):
    """The network's output with the label and, for guidance, without: one evaluation, of a doubled batch. t: one, on x's device."""
    t = (t * (1000 / c.T)).expand(len(x))
    if label is None or c.guidance == 1:
        return net(x, t, label), None
    return net(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), torch.cat([label, torch.full_like(label, c.labels)])).chunk(2)


# ============================================================================================================= Train
def train(c):
    """Algorithm 1. Returns whether there was anything left to train."""
    runs.join(c)
    data = runs.load_data(c)
    c.labels = runs.count_labels(c, data.classes)
    torch.manual_seed(c.seed)
    with runs.inputs():
        net = network(c, data.shape).to(c.device)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(net.parameters(), c.lr, fused=c.device.type != "mps")
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net

    ab = alpha_bar(c.schedule, c.T)
    a, s = ab.sqrt().float().to(c.device), (1 - ab).sqrt().float().to(c.device)
    tables = step_tables(c, torch.arange(1, c.T + 1)).to(c.device)

    for step in run:
        x0, label = runs.training_batch(data, c, step, c.flip)
        label = runs.drop_labels(label, c, step) if c.conditional else None
        t = (runs.spread(c, step) * c.T).long().clamp(max=c.T - 1).to(c.device) + 1  # each of 1..T as often as any other
        x_t, eps = add_noise(x0, a[t], s[t], c.seed, runs.rows(c.batch).start, step, NOISE)

        with runs.autocast(c):
            out = f(x_t, t * (1000 / c.T), label)
        each = [-1] + [1] * (x0.ndim - 1)
        value = loss(c, out.float(), x0, x_t, eps, a[t].view(each), s[t].view(each), t, tables)

        optimizer.param_groups[0]["lr"] = c.lr * min(1, step / max(1, c.warmup))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        runs.average_gradients(net.parameters())
        optimizer.step()
        ema.update(net)
        run.log(loss=value)
    runs.leave()
    return run.step > run.began


# ========================================================================================================== Evaluate
@torch.no_grad()
def bits_per_dim(c, net, data, n=500, draws=16):
    """The variational bound on -log2 p(x0) per dimension over n held-out pictures: mean and its standard error (eq. 5).

    The terms of t = 1 and T are computed for each picture, those between at `draws` stratified t each: unbiased.
    """
    chosen = metrics.choice(len(data), n)
    ab = alpha_bar(c.schedule, c.T)
    a, s = ab.sqrt().float().to(c.device), (1 - ab).sqrt().float().to(c.device)
    tables, total = step_tables(c, torch.arange(1, c.T + 1)).to(c.device), []
    for first in runs.progress(range(0, len(chosen), 32), "bits/dim"):
        index = chosen[first:first + 32]
        x0, label = data.batch(index, c.device)
        label = torch.where(label < 0, c.labels, label) if c.conditional else None
        log_s2 = torch.log1p(-ab[c.T])  # the prior: KL(q(x_T | x0) || N(0, 1))
        sum_bits = (0.5 * (a[c.T] ** 2 * x0 ** 2 - ab[c.T] - log_s2)).flatten(1).mean(1).cpu().double() / math.log(2)
        u = torch.rand((draws, len(index)), generator=runs.generator(c.seed, JUDGE, first))
        u = ((torch.arange(draws)[:, None] + u) / draws * (c.T - 1)).long().clamp(max=c.T - 2) + 2  # 2..T
        for draw, t in enumerate([torch.ones(len(index), dtype=torch.long), *u]):
            t = t.to(c.device)
            x_t, _ = add_noise(x0, a[t], s[t], c.seed, first, draw, JUDGE)
            with runs.autocast(c):
                out = net(x_t, t * (1000 / c.T), label)
            sum_bits += bound(c, x0, x_t, out.float(), t, tables).cpu().double() * (1 if draw == 0 else (c.T - 1) / draws)
        total.append(sum_bits)
    total = torch.cat(total)
    return total.mean().item(), (total.std() / len(total) ** 0.5).item()


# ============================================================================================================== Main
def check(c):
    """What the flags of one command, or flags and checkpoint together, cannot mean."""
    with runs.inputs():
        timesteps(c.T, c.steps or 1)
        runs.idle(c)
        if not c.conditional and (c.label >= 0 or c.guidance != 1):
            raise ValueError("--label and --guidance need a model trained with --conditional")


def main():
    c = runs.parse("ddpm", Config, RECIPES, __doc__)
    asked = c.sample
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
    few = c.steps or min(50, c.T)  # the sheet that training leaves need not take minutes
    if c.sample:
        steps = c.steps or c.T if asked else few
        frames, label = [] if c.out.endswith(".gif") else None, runs.sample_labels(c, c.sheet, c.label)
        x, watch = runs.draw(c, lambda first, n, y: sample(c, net, shape, first, n, steps, y, frames), c.sheet, label)
        with runs.inputs():
            print(watch.report(steps, pictures.save(c.out or c.run / "samples.png", x, label, frames)))
    if c.evaluate:
        n = c.n or 1000
        x, watch = runs.draw(c, lambda first, n, y: sample(c, net, shape, first, n, few, y), n, runs.sample_labels(c, n))
        result = metrics.judge(c, x, few, watch)
        if len(shape) == 3:
            result["bits/dim"], result["bits/dim +-"] = bits_per_dim(c, net, runs.load_data(c, "test"))
        metrics.write_result(c, result)


if __name__ == "__main__":
    main()
