"""DDIM: denoising diffusion implicit models. Song, Meng, Ermon 2020 (arXiv:2010.02502).

    python ddim.py --train                          # digits, drawn on the spot
    python ddim.py --sample --steps 20              # a sheet in runs/ddim-digits/samples.png; a ddpm.py run will do too
    python ddim.py --evaluate                       # FCD, precision, recall, ... at 50 steps
    python ddim.py --encode a.png b.png             # pictures to noise and back, with the error for 10 to 1000 steps
    python ddim.py --interpolate --out walk.png     # between the noises of neighbouring samples

Digits on two cores of a Xeon without a GPU: 2.5 minutes of training, FCD 1.1 (floor 0.16) at 50 steps, one run.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import metrics, pictures, runs
from common.data import read_pictures
from common.runs import NOISE, START, STEP, option
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
    predict: str = option("v", "what the network's output means", choices=("eps", "x0", "v"))
    conditional: bool = option(False, "train on class labels too, a tenth of them dropped for guidance")
    steps: int = option(0, "network evaluations, 1 to T; default 50, or T where that is less", "sample evaluate", low=1)
    spacing: str = option("linear", "of the steps: linear, or quadratic, which is denser near the data", "sample evaluate",
                          choices=("linear", "quadratic"))
    eta: float = option(0.0, "noise of each step: 0 none (DDIM), 1 as much as DDPM", "sample evaluate", low=0, high=1)
    sigma_hat: bool = option(False, "the larger noise sqrt(1 - alpha_bar_t / alpha_bar_s) with the mean of eta 1", "sample evaluate")
    label: int = option(-1, "draw only this class; default each in turn", "sample", low=0)
    guidance: float = option(1.0, "classifier-free guidance: eps + (w - 1)(eps - eps without label)", "sample evaluate", low=0)
    encode: tuple = option((), "pictures to encode into noise and decode again (with no name: eight held-out ones)", "sample",
                           part=Path, acts=True)
    interpolate: bool = option(False, "eleven steps from each sample's noise to the next one's, a row each", "sample", acts=True)

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
# tau_1 < ... < tau_K = T: the steps visited; from t = tau_i the next is s = tau_{i-1}, and s = 0, clean data, at the end
# The paper writes alpha for what is alpha_bar here.


# ======================================================================================================== The method
def network(c, shape):
    """The network for data of this shape, (C, H, W) or (2,)."""
    outputs = shape[0] * (2 if getattr(c, "variance", None) == "learned" else 1)  # of a ddpm.py checkpoint
    if len(shape) == 1:
        return MLP(shape[0], outputs, c.width, classes=c.labels)
    return UNet(shape[0], outputs, shape[-1], c.width, c.multipliers, c.blocks, c.attention, c.heads, c.labels,
                resample=c.resample).to(memory_format=torch.channels_last)  # spares a copy at each convolution


def step_coefficients(c, tau):
    """Of eq. 12 for every step of the walk down tau (rising): float32 (K, 5), the coefficients of kernels/diffuse.py's update.

    x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s - sigma^2) eps + noise, with eps = (x_t - sqrt(ab_t) x0) / sqrt(1 - ab_t) of the x0 that
    is used, clipped or not.
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, torch.cat([torch.zeros(1, dtype=torch.long), tau[:-1]])
    ab_t, ab_s = ab[t], ab[s]
    sigma_1 = ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).sqrt()  # eq. 16 with eta = 1
    sigma = sigma_1 if c.sigma_hat else c.eta * sigma_1
    noise = (1 - ab_t / ab_s).sqrt() * (s > 0) if c.sigma_hat else sigma
    c_x = ((1 - ab_s - sigma ** 2).clamp(min=0) / (1 - ab_t)).sqrt()
    c_0 = ab_s.sqrt() - c_x * ab_t.sqrt()
    return torch.stack([*prediction(c.predict, ab_t, ab[t - 1]), c_x, c_0, noise], 1).float()


def encode_coefficients(c, tau):
    """Of the same walk upwards with sigma = 0, from s to t (eq. 13 reversed): float32 (K, 5), and where the network is asked.

    x_t = sqrt(ab_t / ab_s) x_s + (sqrt(1 - ab_t) - sqrt(ab_t / ab_s) sqrt(1 - ab_s)) eps(x_s, s); clean data is asked about as t = 1.
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, torch.cat([torch.zeros(1, dtype=torch.long), tau[:-1]])
    asked = s.clamp(min=1)
    p_x, p_out = prediction(c.predict, ab[asked], ab[asked - 1])
    a, sd = ab[asked].sqrt(), (1 - ab[asked]).sqrt()  # eps = (x - a x0) / sd, so x_t = (ratio + k / sd) x - (k a / sd) x0
    ratio = (ab[t] / ab[s]).sqrt()
    k = (1 - ab[t]).sqrt() - ratio * (1 - ab[s]).sqrt()
    return torch.stack([p_x, p_out, ratio + k / sd, -k * a / sd, torch.zeros_like(k)], 1).float(), asked


# ============================================================================================================ Sample
@torch.no_grad()
def sample(c, net, shape, first, n, steps, label=None, frames=None, x=None, clip=True):
    """Draw samples first .. first + n - 1 of c.seed with exactly `steps` network evaluations.

    label: (n,) int64 or None; frames: a list that receives x0 as predicted at each step; x: the noise to start from, instead
    of the seed's; clip: whether x0 is kept in [-1, 1] (pictures only). Returns (n, *shape).
    """
    tau = timesteps(c.T, steps, c.spacing)
    walk = zip(tau.flip(0).to(c.device)[:, None], step_coefficients(c, tau).flip(0).to(c.device))
    x = randn((n, *shape), c.seed, first, stream=START, device=c.device) if x is None else x  # x_T
    index, seed = torch.arange(first, first + n, device=c.device), torch.tensor(c.seed, device=c.device)
    for t, coef in runs.progress(list(walk), f"samples {first} to {first + n - 1}"):
        x, x0 = runs.replayed(c, step, net, x, t, coef, seed, index, label, clip and len(shape) == 3)
        if frames is not None:
            frames.append(x0.cpu())
    return x.clone()  # a graph's own result would change with its next replay


def step(c, net, x, t, coef, seed, index, label, clip):
    """From x_t to x_s, and x0 as predicted. t (1,), coef (5,), seed (), index (n,): the step, its row, which samples, on x's device."""
    with runs.autocast(c):
        out, out_uncond = guided(c, net, x, t, label)
    return denoise_step(x, out, coef, seed, index, t[0], STEP, out_uncond=out_uncond, guidance=c.guidance, clip=clip,
                        return_x0=True)


@torch.no_grad()
def encode(c, net, x, steps):
    """Clean pictures (n, C, H, W) to the noise x_T that deterministic sampling with as many steps turns into them again."""
    for coef, asked in runs.progress(list(zip(*encode_coefficients(c, timesteps(c.T, steps, c.spacing)))), "encoding"):
        with runs.autocast(c):
            out, _ = guided(c, net, x, asked.to(c.device), None)
        x = denoise_step(x, out, coef.to(c.device))
    return x


def guided(c, net, x, t, label):
    """The network's output with the label and, for guidance, without: one evaluation, of a doubled batch. t: one, on x's device."""
    t = (t * (1000 / c.T)).expand(len(x))
    if label is None or c.guidance == 1:
        out, out_uncond = net(x, t, label), None
    else:
        both = torch.cat([label, torch.full_like(label, c.labels)])
        out, out_uncond = net(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), both).chunk(2)
    keep = x.shape[1]  # the rest is a ddpm.py model's variance
    return out[:, :keep], None if out_uncond is None else out_uncond[:, :keep]


def slerp(x, y, w):
    """Along the great circle from x to y, flattened samples (n, ...), at w in [0, 1] (appendix D.5)."""
    cosine = (x * y).flatten(1).sum(1) / (x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-6).view(-1, *[1] * (x.ndim - 1))
    return (((1 - w) * angle).sin() * x + (w * angle).sin() * y) / angle.sin()


# ============================================================================================================= Train
def train(c):
    """The loss of eq. 5 with gamma = 1: DDPM's. Returns whether there was anything left to train."""
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

    for step in run:
        x0, label = runs.training_batch(data, c, step, c.flip)
        label = runs.drop_labels(label, c, step) if c.conditional else None
        t = (runs.spread(c, step) * c.T).long().clamp(max=c.T - 1).to(c.device) + 1  # each of 1..T as often as any other
        x_t, eps = add_noise(x0, a[t], s[t], c.seed, runs.rows(c.batch).start, step, NOISE)

        with runs.autocast(c):
            out = f(x_t, t * (1000 / c.T), label)
        each = [-1] + [1] * (x0.ndim - 1)
        y = {"eps": eps, "x0": x0, "v": a[t].view(each) * eps - s[t].view(each) * x0}[c.predict]
        loss = (y - out.float()).square().mean()

        optimizer.param_groups[0]["lr"] = c.lr * min(1, step / max(1, c.warmup))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        runs.average_gradients(net.parameters())
        optimizer.step()
        ema.update(net)
        run.log(loss=loss)
    runs.leave()
    return run.step > run.began


# ============================================================================================================== Main
def check(c):
    """What the flags of one command, or flags and checkpoint together, cannot mean."""
    with runs.inputs():
        timesteps(c.T, c.steps or 1)
        runs.idle(c)
        if not c.conditional and (c.label >= 0 or c.guidance != 1):
            raise ValueError("--label and --guidance need a model trained with --conditional")
        if c.sigma_hat and "eta" in c.given:
            raise ValueError("--sigma-hat sets the noise itself: leave out --eta")
        if (c.interpolate or "encode" in c.given) and (c.eta or c.sigma_hat):
            raise ValueError("--encode and --interpolate need the deterministic walk: leave out --eta and --sigma-hat")
        for flag in {"n", "steps", "label", "guidance", "interpolate"} & c.given if "encode" in c.given else ():
            raise ValueError(f"--{flag} does nothing with --encode: leave it out")


def main():
    c = runs.parse("ddim", Config, RECIPES, __doc__)
    if c.train:
        check(c)
        runs.finish(c, train(c))
    if runs.rank() != 0 or not (c.sample or c.evaluate):
        return
    ddpm = Path("runs") / f"ddpm-{c.name}" / "checkpoint.pt"
    if not {"checkpoint", "run"} & c.given and not (c.run / "checkpoint.pt").exists() and ddpm.exists():
        c.checkpoint = str(ddpm)
        print(f"{c.run} holds no model yet: sampling from {ddpm}")
    saved, c = runs.trained(c, ("ddim", "ddpm"))
    check(c)
    shape, c.labels = saved["data"]["shape"], runs.count_labels(c, saved["data"]["classes"])
    with runs.inputs():
        ema = runs.EMA(network(c, shape).to(c.device), c.ema)
        runs.load_states(saved, c.checkpoint, ema=ema)
    net = torch.compile(ema.net) if c.compile else ema.net
    steps = c.steps or min(50, c.T)

    if len(shape) != 3 and (c.interpolate or "encode" in c.given):
        runs.stop("--encode and --interpolate are for pictures, and this model makes points")
    if "encode" in c.given:
        round_trip(c, net, shape)
    elif c.interpolate:
        interpolate(c, net, shape, c.n or 8, steps)
    elif c.sample:
        frames, label = [] if c.out.endswith(".gif") else None, runs.sample_labels(c, c.sheet, c.label)
        x, watch = runs.draw(c, lambda first, n, y: sample(c, net, shape, first, n, steps, y, frames), c.sheet, label)
        with runs.inputs():
            print(watch.report(steps, pictures.save(c.out or c.run / "samples.png", x, label, frames)))
    if c.evaluate:
        n = c.n or 1000
        x, watch = runs.draw(c, lambda first, n, y: sample(c, net, shape, first, n, steps, y), n, runs.sample_labels(c, n))
        metrics.write_result(c, metrics.judge(c, x, steps, watch))


def round_trip(c, net, shape):
    """Encode and decode pictures with several numbers of steps: a table of errors, and a sheet, a row for each number (table 2)."""
    with runs.inputs():
        test = None if c.encode else runs.load_data(c, "test")
        x0 = read_pictures(c.encode, shape).to(c.device) if c.encode else test.batch(metrics.choice(len(test), 8), c.device)[0]
    rows = [x0]
    print("steps  error (mean square, per value in 0..1)")
    for steps in [k for k in (10, 20, 50, 100, 1000) if k <= c.T]:
        x_T = encode(c, net, x0, steps)
        rows.append(sample(c, net, shape, 0, len(x0), steps, x=x_T, clip=False))
        print(f"{steps:5}  {((rows[-1] - x0) / 2).square().mean().item():.6f}")
    print(pictures.save(c.out or c.run / "encode.png", torch.cat(rows).cpu(), columns=len(x0)))


def interpolate(c, net, shape, n, steps):
    """n rows, each eleven samples from the noise of sample i to that of sample i + 1, never clipped (figure 6)."""
    x = randn((n + 1, *shape), c.seed, stream=START, device=c.device)
    columns = [sample(c, net, shape, 0, n, steps, runs.sample_labels(c, n, c.label), x=slerp(x[:-1], x[1:], w), clip=False).cpu()
               for w in torch.linspace(0, 1, 11, device=c.device)]
    print(pictures.save(c.out or c.run / "interpolate.png", torch.stack(columns, 1).flatten(0, 1), columns=11))


if __name__ == "__main__":
    main()
