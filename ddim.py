"""DDIM: denoising diffusion implicit models.
Song, Meng, Ermon 2020 (arXiv:2010.02502). What the paper calls alpha is alpha_bar here.

    noising    x_t = signal_t x0 + noise_t eps    signal^2 = alpha_bar = 1 - noise^2  (4)
    training   | target - net(x_t, t) |^2         target: eps, x0 or v                (5)
    sampling   x0' = p_x x_t + p_out net(x_t, t)  clipped to [-1, 1]                  (9)
               x_s = c_x x_t + c_0 x0' + c_n eps  s < t, the next of the steps visited (12)

    python ddim.py --train                        # digits, drawn on the spot
    python ddim.py --sample --steps 20            # a sheet in the run; a ddpm.py run will do too
    python ddim.py --evaluate                     # FCD, precision, recall, ... at 50 steps
    python ddim.py --encode a.png b.png           # to noise and back: errors for 10 to 1000 steps
    python ddim.py --interpolate --out walk.png   # between the noises of neighbouring samples
    python ddim.py --interpolate a.png b.png      # or of one's own pictures

Digits on two cores of a Xeon: 2.5 minutes, FCD 1.1 (floor 0.16) at 50 steps, one run.
"""
from dataclasses import dataclass
from pathlib import Path

from common import early  # noqa: F401  first, since torch takes seconds
import torch
import torch.nn.functional as F

from common import flags, gpu, metrics, pictures, processes, runs, sampling, unet
from common.data import read_pictures
from common.draws import NOISE, START, STEP, sample_labels
from common.files import inputs, stop, written
from common.flags import option
from common.progress import progress
from common.schedules import SCHEDULES, alpha_bar, at, before, prediction, timesteps
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================ Flags
@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    T: int = option(1000, "steps from data to noise", low=2, high=10 ** 7, of_model=True)
    schedule: str = option("cosine", "how alpha_bar falls from 1 to about 0", choices=SCHEDULES,
                           of_model=True)
    predict: str = option("v", "what the network's output is", choices=("eps", "x0", "v"),
                          of_model=True, fp32=("mean",))  # which a ddpm.py checkpoint may have
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    steps: int = option(0, "network evaluations; default 50, or T where that is less",
                        "sample evaluate", low=1, high="T")
    spacing: str = option("linear", "of the steps; quadratic is denser near the data",
                          "sample evaluate", choices=("linear", "quadratic"))
    eta: float = option(0.0, "noise of each step: 0 none (DDIM), 1 as much as DDPM",
                        "sample evaluate", low=0, high=1)
    sigma_hat: bool = option(False, "the larger noise sqrt(1 - alpha_bar_t / alpha_bar_s) with the "
                             "mean of eta 1", "sample evaluate", idles="eta")
    encode: tuple = option((), "pictures to encode into noise and decode again (with no name: "
                           "eight held-out ones)", "sample", part=Path, acts=True, of_pictures=True,
                           idles="n steps label guidance interpolate eta sigma_hat")
    interpolate: tuple = option((), "eleven steps from each picture's noise to the next one's, a "
                                "row each: of these pictures, or with no name of --n samples",
                                "sample", part=Path, acts=True, of_pictures=True,
                                idles="eta sigma_hat")


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
# eps ~ N(0, 1);  signal, noise (T + 1,): sqrt(alpha_bar), sqrt(1 - alpha_bar)
# tau_1 < ... < tau_K = T: the steps visited; from t = tau_i the next is s = tau_{i-1}, and s = 0,
# clean data, at the end;  guess: what the network says of x_t;  v = signal eps - noise x0


# ======================================================================================= The method
def network(c):
    """As many channels out as in; of a ddpm.py checkpoint twice, for its learned variance."""
    return unet.build(c, c.shape, c.shape[0] * (2 if variance_of(c) == "learned" else 1))


def variance_of(c):
    """What a ddpm.py checkpoint says of its variance, which is left out here; else nothing."""
    return getattr(c, "variance", "")


def walk(c, tau):
    """Coefficients of eq. 12 for the steps down tau (rising, ending at T): float32 (K, 5).

    p_x, p_out, c_x, c_0, c_n of the update in this file's head, where eq. 12 says
    x_s = sqrt(ab_s) x0' + sqrt(1 - ab_s - sigma^2) eps' + sigma eps, with the eps' that belongs to
    the x0' which is used, clipped or not: eps' = (x_t - sqrt(ab_t) x0') / sqrt(1 - ab_t).
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, before(tau)
    ab_t, ab_s = ab[t], ab[s]
    sigma_1 = ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).sqrt()  # eq. 16 with eta = 1
    sigma = sigma_1 if c.sigma_hat else c.eta * sigma_1
    c_n = (1 - ab_t / ab_s).sqrt() * (s > 0) if c.sigma_hat else sigma
    c_x = ((1 - ab_s - sigma ** 2).clamp(min=0) / (1 - ab_t)).sqrt()
    c_0 = ab_s.sqrt() - c_x * ab_t.sqrt()
    p_x, p_out = prediction(c.predict, ab_t, ab[t - 1])
    return torch.stack([p_x, p_out, c_x, c_0, c_n], 1).float()


def walk_up(c, tau):
    """Coefficients of the same walk upwards with sigma = 0, from s to t (eq. 13 reversed).

    x_t = ratio x_s + k eps'(x_s, s), ratio = sqrt(ab_t / ab_s), k = sqrt(1 - ab_t) - ratio
    sqrt(1 - ab_s). Returns float32 (K, 5), and where the network is asked, int64 (K,): about clean
    data as about t = 1.
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, before(tau)
    asked = s.clamp(min=1)
    p_x, p_out = prediction(c.predict, ab[asked], ab[asked - 1])
    signal, noise = ab[asked].sqrt(), (1 - ab[asked]).sqrt()
    ratio = (ab[t] / ab[s]).sqrt()
    k = (1 - ab[t]).sqrt() - ratio * (1 - ab[s]).sqrt()
    # eps' = (x_s - signal x0') / noise
    c_x, c_0 = ratio + k / noise, -k * signal / noise
    return torch.stack([p_x, p_out, c_x, c_0, torch.zeros_like(k)], 1).float(), asked


def objective(c, out, x0, eps, signal, noise):
    """Eq. 5 with gamma = 1, which is DDPM's. signal, noise: (B, 1, ...), at t. A scalar."""
    target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[c.predict]
    return F.mse_loss(out.float(), target)


# =========================================================================================== Sample
def few(c):
    """Steps where none are asked for: all T would take minutes."""
    return min(50, c.T)


@torch.no_grad()
def sample(c, net, first, n, steps=None, label=None, frames=None, x=None, clip=True):
    """`steps` of the T steps down: samples first .. first + n - 1 of c.seed.

    label: int64 (n,) or None; frames: a list that receives each step's x0'; x: the noise to start
    from, instead of the seed's; clip: whether x0' is kept in [-1, 1] (pictures only). Returns
    (n, *c.shape), about in [-1, 1]. Of c are read T, schedule and predict, as the model has them;
    shape, labels, device, precision; and seed, guidance, spacing, eta, sigma_hat.
    """
    steps = steps or few(c)
    tau = timesteps(c.T, steps, c.spacing)
    table = walk(c, tau).to(c.device)
    tau = tau.to(c.device)
    which = torch.arange(first, first + n, device=c.device)
    seed = torch.tensor(c.seed, device=c.device)
    down = sampling.captured(denoise, c, net)  # on CUDA a graph, replayed
    if x is None:
        x = randn((n, *c.shape), c.seed, first, stream=START, device=c.device)  # x_T
    for i in progress(range(steps)[::-1], f"samples {first} to {first + n - 1}"):
        x, x0_ = down(x, tau[i:i + 1], table[i], seed, which, label, clip)
        if frames is not None:
            frames.append(x0_.cpu())
    return x


def denoise(c, net, x, t, row, seed, which, label, clip):
    """From x_t to x_s, and x0' on the way: the last two lines of this file's head, in one pass.

    t (1,): the step; row (5,): its coefficients; seed () and which (n,): what eps is drawn by.
    """
    given, without = dict(label=label), dict(label=c.labels)
    out, out_uncond = sampling.guided(c, net, x, t / c.T, given, without)
    if variance_of(c) == "learned":
        out = out.chunk(2, 1)[0]
        out_uncond = None if out_uncond is None else out_uncond.chunk(2, 1)[0]
    return denoise_step(x, out, row, seed, which, t[0], STEP, out_uncond=out_uncond,
                        guidance=c.guidance, clip=clip and x.ndim == 4, return_x0=True)


# ============================================================================================ Train
def train(c):
    """As DDPM (algorithm 1 there)."""
    data = runs.begin(c)  # sets c.shape, c.labels and the seed
    net = network(c).to(c.device)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(runs.learnable(net), c.lr, **gpu.adam(c.device))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net

    ab = alpha_bar(c.schedule, c.T)
    signal = ab.sqrt().float().to(c.device)
    noise = (1 - ab).sqrt().float().to(c.device)

    def update(x0, label, first, t, number):
        """What an update computes, of tensors.

        t (b,): each sample's step; first: the number of the first one; number: of the update, ().
        """
        # Noised data
        x_t, eps = add_noise(x0, signal[t], noise[t], c.seed, first, number, NOISE)

        # The network's guess, and how far it is off
        with flags.autocast(c):
            out = f(x_t, t / c.T, label)
        loss = objective(c, out, x0, eps, at(signal, t, x0), at(noise, t, x0))

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


# ============================================================================= Encode, interpolate
@torch.no_grad()
def encode(c, net, x, steps):
    """Clean pictures (n, C, H, W) to the x_T that sampling with as many steps turns into them."""
    table, asked = walk_up(c, timesteps(c.T, steps, c.spacing))
    table, asked = table.to(c.device), asked.to(c.device)
    for i in progress(range(steps), "encoding"):
        time = asked[i:i + 1] / c.T
        out, _ = sampling.guided(c, net, x, time, dict(label=None), {})
        if variance_of(c) == "learned":
            out = out.chunk(2, 1)[0]
        x = denoise_step(x, out, table[i])  # never clipped
    return x


def round_trip(c, net):
    """Encode and decode pictures with several numbers of steps: a table of errors, and a sheet.

    A row of the sheet for each number, below the pictures themselves (the paper's table 2).
    """
    with inputs():
        if c.encode:
            x0 = read_pictures(c.encode, c.shape, tell=True).to(c.device)
        else:
            test = runs.load_data(c, "test")
            x0, _ = test.batch(metrics.choice(len(test), 8), c.device)
    rows = [x0]
    print("steps  error (mean square, per value in 0..1)")
    for steps in [k for k in (10, 20, 50, 100, 1000) if k <= c.T] or [c.T]:
        x_T = encode(c, net, x0, steps)
        rows.append(sample(c, net, 0, len(x0), steps, x=x_T, clip=False))
        print(f"{steps:5}  {((rows[-1] - x0) / 2).square().mean().item():.6f}")
    with inputs():
        path = Path(c.out or c.run / "encode.png")
        if path.suffix == ".npz":
            save_noise(path, x0, x_T, rows[-1])
        else:
            pictures.save(path, torch.cat(rows).cpu(), columns=len(x0))
    print(f"the pictures, and below them a row for each number of steps: {path}")


def save_noise(path, x0, x_T, again):
    """noise float32 (N, C, H, W), of the most steps; pictures and reconstructions uint8."""
    import numpy as np
    arrays = {name: pictures.to_uint8(x.cpu()).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
              for name, x in (("pictures", x0), ("reconstructions", again))}
    with written(path) as file, open(file, "wb") as handle:
        np.savez(handle, noise=x_T.cpu().numpy(), **arrays)


def slerp(x, y, w):
    """Along the great circle from x to y, flattened samples (n, ...), at w in [0, 1] (D.5)."""
    norms = x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    cosine = (x * y).flatten(1).sum(1) / norms
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-6)
    angle = angle.view(-1, *[1] * (x.ndim - 1))
    return (((1 - w) * angle).sin() * x + (w * angle).sin() * y) / angle.sin()


def interpolate(c, net, n, steps):
    """n rows of eleven samples, from sample i's noise to sample i + 1's, never clipped (fig. 6).

    With pictures from the noise that each is encoded to, a row fewer than there are.
    """
    if c.interpolate:
        with inputs():
            x0 = read_pictures(c.interpolate, c.shape, tell=True).to(c.device)
        x, n, label = encode(c, net, x0, steps), len(x0) - 1, None
    else:
        x = randn((n + 1, *c.shape), c.seed, stream=START, device=c.device)
        label = sample_labels(c, n, c.label)
    columns = []
    for w in torch.linspace(0, 1, 11, device=c.device):
        x_T = slerp(x[:-1], x[1:], w)
        columns.append(sample(c, net, 0, n, steps, label, x=x_T, clip=False).cpu())
    with inputs():
        path = Path(c.out or c.run / "interpolate.png")
        if path.suffix == ".gif":  # which moves from each to the next
            print(pictures.save(path, columns[-1], frames=columns, columns=1))
        else:
            print(pictures.save(path, torch.stack(columns, 1).flatten(0, 1), columns=11))


# ============================================================================================= Main
def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16, steps=20) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", eta=0.5. main has parsed them.
    """
    c = parsed or flags.settings("ddim", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c, ("ddim", "ddpm"), also=("variance",))
    return c, runs.restored(c, network(c), saved)


def check(c):
    """Stop for what the flags together cannot mean."""
    if len(c.interpolate) == 1:
        stop("--interpolate has one picture: give two or more, or none for samples")
    for name in ("n", "label", "guidance") if c.interpolate else ():
        if name in c.given and not c.evaluate:
            stop(f"--{name} does nothing with the pictures of --interpolate: leave it out")


def main():
    c = flags.parse("ddim", FLAGS, RECIPES, __doc__)
    check(c)
    if c.train:
        train(c)
    if not (c.sample or c.evaluate):
        return
    ddpm = Path("runs") / f"ddpm-{c.name}" / "checkpoint.pt"
    own = c.run / "checkpoint.pt"
    if not {"checkpoint", "run"} & c.given and not own.exists() and ddpm.exists():
        c.checkpoint = str(ddpm)
        print(f"{c.run} holds no model yet: sampling from {ddpm}")
    c, net = load(parsed=c)
    steps = c.steps or few(c)
    if "encode" in c.given:
        round_trip(c, net)
    elif "interpolate" in c.given:
        interpolate(c, net, c.n or 8, steps)
    elif c.sample:
        draw = sampling.Draw(c, c.sheet, c.label)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label, draw.frames))
        draw.save(steps)
    if c.evaluate:
        metrics.prepare(c)
        draw = sampling.Draw(c, c.n or 1000)
        for first, n, label in draw:
            draw.keep(sample(c, net, first, n, steps, label))
        metrics.write_result(c, metrics.judge(c, draw, steps))


if __name__ == "__main__":
    main()
