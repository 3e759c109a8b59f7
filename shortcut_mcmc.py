"""Shortcut MCMC: K of T steps, and a loss that looks at the end of the chain.
Chen 2023 (arXiv:2301.01206), over the bound of Kingma 2021 (arXiv:2107.00630) with a linear gamma.

    noising    x_t = signal_t x0 + noise_t eps    signal^2 = sigmoid(-gamma), gamma linear in t
    training   gamma'/2 | eps - eps'(x_t, t) |^2 + lambda F       (Kingma's 17, and Chen's term)
               F = | x0 - x0' |^2 at the end of K shortcuts from x_T of x0, or an energy score
    sampling   x0' = p_x x_t + p_out net(x_t, t)  clipped to [-1, 1]
               x_s = c_x x_t + c_0 x0' + c_n eps  Chen's: signal_s x0' + noise_s eps

The authors' code (2-D, JAX) differs: it asks the network K + 1 times and may draw t = 0, draws the
steps once, when it is compiled, and one noise for the start and all steps of a chain, which lets
the network cancel it. Here steps and noises are drawn anew in each update.

    python shortcut_mcmc.py --train --data swirl           # 1,024 points, T = 200
    python shortcut_mcmc.py --sample --data swirl --steps 10
    python shortcut_mcmc.py --train                        # digits, drawn on the spot
    python shortcut_mcmc.py --sample --update renoise      # as the paper samples

Swirl on one core of a Xeon: 3 minutes, ten shortcuts: sliced Wasserstein 0.095 with the energy
score, 0.153 with squares, 0.122 without (floor 0.020), three runs each. Digits on two cores: 2.5
minutes, FCD 1.8 (floor 0.16) at 20 ancestral steps, one run, without the term, which made pictures
worse.
"""
import math
from dataclasses import dataclass

from common import early  # noqa: F401  first, since torch takes seconds
import torch
from torch.utils.checkpoint import checkpoint as recomputed

from common import draws, flags, gpu, metrics, processes, runs, sampling, unet
from common.draws import NOISE, START, STEP, VISIT, sample_labels
from common.files import stop
from common.flags import option
from common.progress import progress
from common.schedules import before, posterior, prediction, timesteps
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn

GAMMA_0, GAMMA_1 = -13.3, 5.0  # gamma at t = 0 and T: of clean data, of noise


# ============================================================================================ Flags
@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    T: int = option(200, "steps from data to noise", low=2, high=10 ** 7, of_model=True)
    predict: str = option("v", "what the network's output is", choices=("eps", "v"), of_model=True)
    weight: str = option("sigmoid", "of the loss; bound: none, for the fewest bits; sigmoid: "
                         "sigmoid(gamma + 2), for the eye", choices=("bound", "sigmoid"))
    fidelity: float = option(0.0, "lambda: what the end of a chain counts in the loss; 0: nothing",
                             low=0)
    score: str = option("energy", "how it is compared with the data: by squares (the paper's), or "
                        "by an energy score over two chains", choices=("square", "energy"),
                        needs="fidelity")
    K: int = option(5, "steps of a chain in training", low=1, high="T", needs="fidelity")
    every: int = option(5, "updates from one chain to the next; as many in each row of "
                        "metrics.csv", choices=(1, 2, 5, 10), needs="fidelity")
    part: int = option(16, "samples of the batch that begin chains", low=1, high="batch",
                       needs="fidelity")
    alternate: bool = option(False, "by turns an update of the bound and one of the fidelity, as "
                             "the authors' code", needs="fidelity", idles="every")
    checkpoint_chain: bool = option(False, "compute a chain anew in the backward pass instead of "
                                    "keeping it: less memory, more time", needs="fidelity")
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    steps: int = option(0, "network evaluations; default 20, or T where that is less",
                        "sample evaluate", low=1, high="T")
    spacing: str = option("even", "of the steps; random: one set for all samples of a seed",
                          "sample evaluate", choices=("even", "random"))
    update: str = option("ancestral", "from x_t to x_s; renoise: the paper's shortcut",
                         "sample evaluate", choices=("renoise", "ancestral", "flow"))


FLAGS = (Config, flags.Unet, flags.Training, flags.Labels, flags.Guidance)

RECIPES = {  # by data set: "" is all of them, "pictures" any path; each is laid over those above
    "": dict(width=64, multipliers=(1, 2, 2), blocks=1, attention=(16, 8), heads=4, batch=64,
             lr=5e-4, ema=0.9995, iters=100_000),
    "mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "fashion-mnist": dict(multipliers=(1, 2, 2, 2), iters=20_000, ema=0.999),
    "cifar10": dict(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), batch=128,
                    lr=2e-4, warmup=5000, ema=0.9999, iters=500_000, flip=True),
    "pictures": dict(flip=True),
    # without a GPU what is above is hours; what is below knows a laptop
    "cpu": dict(width=32, multipliers=(1, 2, 2), blocks=1, attention=(), batch=32, lr=1e-3,
                ema=0.999, warmup=100, iters=100_000, minutes=10),
    "digits": dict(width=32, attention=(), batch=64, lr=2e-3, ema=0.995, iters=3000,
                   minutes=2.5),
    "stacked": dict(width=64, attention=(8,), batch=64, lr=1e-3, ema=0.999, iters=20_000,
                    minutes=0),
    "swirl": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0,
                  fidelity=1, K=10, part=64, every=10),
    "gaussians": dict(width=128, lr=1e-3, ema=0.999, batch=256, iters=10_000, minutes=0),
}

# ========================================================================================= Notation
# x0 (B, C, H, W) data in [-1, 1], or (B, 2);  x0' (in code x0_) what is predicted;  t in 0..T,
# whole in a chain, real in the bound;  time = t / T;  gamma (B,) = log(noise^2 / signal^2) at time
# signal, noise: the two roots at gamma;  eps ~ N(0, 1), fresh in each step and for the start
# tau_1 < ... < tau_K = T: the steps of a chain; from t = tau_i the next is s = tau_{i-1}, and s =
# 0, clean data, at the end: the last step gives x0' itself;  v = signal eps - noise x0
# F: the fidelity term;  number: which of an update's noises: (T + 2) step + 0 the start's, + k the
# k-th step's, + T + 1 the bound's


# ======================================================================================= The method
def network(c):
    """As many channels out as in."""
    return unet.build(c, c.shape, c.shape[0])


def gamma_of(time):
    """Linear from end to end; time in [0, 1]."""
    return GAMMA_0 + (GAMMA_1 - GAMMA_0) * time


def drawn_times(c, u):
    """The time in [0, 1] that each u (B,) in [0, 1) looks at, and what it counts: each (B,).

    The bound is a mean over even times. With the weight sigmoid most of that mean lies at |gamma| <
    4, so there are more times there, even in the angle atan(noise / signal), and each counts by
    d time / d u: the same mean, and a loss that varies less.
    """
    if c.weight == "bound":
        return u, torch.ones_like(u)
    low, high = (2 / math.pi * math.atan(math.exp(end / 2)) for end in (GAMMA_0, GAMMA_1))
    share = low + (high - low) * u
    gamma = 2 * (math.pi / 2 * share).tan().log()
    slope = 2 * math.pi * (high - low) / (math.pi * share).sin()
    return (gamma - GAMMA_0) / (GAMMA_1 - GAMMA_0), slope / (GAMMA_1 - GAMMA_0)


def walk(c, tau, update):
    """Coefficients of the steps down tau (rising, ending at T): float32 (K, 5).

    p_x, p_out, c_x, c_0, c_n of the update in this file's head:
        renoise    x_s = signal_s x0' + noise_s eps, Chen's shortcut; of Gaussian data it keeps at
                   most half of the variance, however good the network
        ancestral  q(x_s | x_t, x0') of any stride (Kingma 2021, eq. 9)
        flow       x_s = signal_s x0' + noise_s eps', the eps' that belongs to x0'
    """
    s = before(tau)
    gamma_t = gamma_of(tau.double() / c.T)
    gamma_s = torch.where(s > 0, gamma_of(s.double() / c.T), -torch.inf)  # clean data have no noise
    signal_s, noise_s = torch.sigmoid(-gamma_s).sqrt(), torch.sigmoid(gamma_s).sqrt()
    signal_t, noise_t = torch.sigmoid(-gamma_t).sqrt(), torch.sigmoid(gamma_t).sqrt()
    p_x, p_out = prediction(c.predict, signal_t ** 2, None)
    if update == "renoise":
        c_x, c_0, c_n = torch.zeros_like(signal_s), signal_s, noise_s
    elif update == "ancestral":
        c_x, c_0, _, variance = posterior(signal_t ** 2, signal_s ** 2)
        c_n = variance.sqrt()
    else:
        c_x, c_n = noise_s / noise_t, torch.zeros_like(signal_s)
        c_0 = signal_s - signal_t * c_x
    return torch.stack([p_x, p_out, c_x, c_0, c_n], 1).float()


def visits(c, K, generator):
    """K of the steps 1..T, T among them, rising: int64 (K,). ValueError for more than T."""
    if K > c.T:
        raise ValueError(f"{K} steps: there are T = {c.T}")
    others = 1 + torch.randperm(c.T - 1, generator=generator)[:K - 1]
    return torch.cat([others.sort().values, torch.tensor([c.T])])


def bound(c, net, x0, time, label, first, number):
    """gamma'/2 |eps - eps'|^2 (Kingma 2021, eq. 17), weighted, in nats per value: (B,)."""
    gamma = gamma_of(time)
    signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x_t, eps = add_noise(x0, signal, noise, c.seed, first, number, NOISE)
    with flags.autocast(c):
        guess = net(x_t, time, label).float()
    if c.predict == "v":
        each = [-1] + [1] * (x0.ndim - 1)
        guess = noise.view(each) * x_t + signal.view(each) * guess
    off = (eps - guess).square().flatten(1).mean(1)
    weight = torch.sigmoid(gamma + 2) if c.weight == "sigmoid" else 1
    return weight * (GAMMA_1 - GAMMA_0) / 2 * off


def descent(c, tau):
    """What a chain down tau (K,) goes by: coefficients (K, 5) and times (K,), on c.device."""
    return gpu.sent(walk(c, tau, "renoise"), c.device), gpu.sent(tau / c.T, c.device)


def chain(c, net, x, table, time, which, label, number):
    """K shortcuts from x = x_T, and x0' at their end; the gradient goes through them all.

    table (K, 5), time (K,): of descent; which (B,): the samples' numbers, and number: the start's,
    by which eps is drawn. x0' is not clipped here: a clipped value would have no gradient.
    """
    def shortcut(x_t, i):
        with flags.autocast(c):
            out = net(x_t, time[i].expand(len(x_t)), label)
        return denoise_step(x_t, out, table[i], c.seed, which, number + len(table) - i, NOISE)

    for i in range(len(table))[::-1]:
        if c.checkpoint_chain:  # all noise is a function of numbers: there is no state to restore
            x = recomputed(shortcut, x, i, use_reentrant=False, preserve_rng_state=False)
        else:
            x = shortcut(x, i)
    return x


def fidelity(c, net, x0, table, time, which, label, number):
    """F of x0 (B, ...): from x_T of x0 down a chain, and its end compared with x0. A scalar.

    square: |x0 - x0'|^2, the paper's, least where x0' is the mean of all x0 that x_T may come from.
    energy: |x0 - x0'| + |x0 - x0''| - |x0' - x0''| over two chains from one x_T, least where x0'
    has the law of those x0 (a proper score). The chain of the best denoiser, which renoises half of
    the variance away, is least for neither: it is nearer to the second. Squares are means over a
    sample's values, norms their roots.
    """
    gamma = gamma_of(torch.ones(len(x0), device=x0.device))
    signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    x_T = add_noise(x0, signal, noise, c.seed, which, number, NOISE, return_eps=False)
    if c.score == "square":
        return (x0 - chain(c, net, x_T, table, time, which, label, number)).square().mean()
    label = None if label is None else label.repeat(2)
    which = torch.cat([which, which + c.batch])  # the second chain's noise is its own
    both = chain(c, net, torch.cat([x_T, x_T]), table, time, which, label, number)
    one, two = both.chunk(2)
    return (distance(x0, one) + distance(x0, two) - distance(one, two)).mean()


def numbers_of(c, step):
    """Which noises are update `step`'s: that of the chain's start and, T + 1 after it, the bound's.

    Between them lie those of the chain's steps, at most T.
    """
    return (c.T + 2) * step, (c.T + 2) * step + c.T + 1


def distance(a, b):
    """The root of the mean square over each sample's values, (B,)."""
    return (a - b).square().flatten(1).mean(1).add(1e-12).sqrt()  # where a = b its gradient is 0


# =========================================================================================== Sample
def few(c):
    """Steps where none are asked for."""
    return min(20, c.T)


@torch.no_grad()
def sample(c, net, first, n, steps=None, label=None, frames=None):
    """`steps` of the T steps down: samples first .. first + n - 1 of c.seed.

    label: int64 (n,) or None; frames: a list that receives each step's x0'. Returns (n, *c.shape),
    about in [-1, 1]. Of c are read T and predict, as the model has them; shape, labels, device,
    precision; and seed, guidance, spacing, update.
    """
    steps = steps or few(c)
    tau = timesteps(c.T, steps)
    if c.spacing == "random":
        tau = visits(c, steps, draws.generator(c.seed, START, steps))
    table = walk(c, tau, c.update).to(c.device)
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

    t (1,): the step; row (5,): its coefficients; seed () and which (n,): what eps is drawn by.
    """
    given, without = dict(label=label), dict(label=c.labels)
    out, out_uncond = sampling.guided(c, net, x, t / c.T, given, without)
    return denoise_step(x, out, row, seed, which, t[0], STEP, out_uncond=out_uncond,
                        guidance=c.guidance, clip=x.ndim == 4, return_x0=True)


# ============================================================================================ Train
def train(c):
    """The bound, and every few updates the fidelity of a part of the batch."""
    check(c)
    data = runs.begin(c)  # sets c.shape, c.labels and the seed
    net = network(c).to(c.device)
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(runs.learnable(net), c.lr, **gpu.adam(c.device))
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net
    every = 2 if c.alternate else c.every

    def update(x0, label, first, u, number, table, times):
        """What an update computes, of tensors.

        u (b,) in [0, 1): of the samples' times; first: the number of the first one; number: of the
        update, (); table, times: of the chain whose end is looked at, or None.
        """
        # The bound, at a time for each sample
        start, own = numbers_of(c, number)
        time, counts = drawn_times(c, u)
        ends = table is not None
        with torch.set_grad_enabled(not (ends and c.alternate)):  # then only to be told
            loss = (counts * bound(c, f, x0, time, label, first, own)).mean()
        told = dict(bound=loss)

        # The end of a chain of K steps, from a part of the batch
        if ends:
            some = slice(None, None, c.batch // c.part)  # evenly, so that each process has some
            which = torch.arange(first, first + len(x0), device=c.device)[some]
            label = None if label is None else label[some]
            F = fidelity(c, f, x0[some], table, times, which, label, start)
            loss = c.fidelity * F + (0 if c.alternate else loss)
        if c.fidelity:  # a row's mean over updates is F's
            told["fidelity"] = every * F if ends else torch.zeros_like(loss)

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
        u = run.spread(step)
        runs.set_rate(optimizer, c.lr * min(1, step / max(1, c.warmup)))

        # Where a chain's end is looked at, its steps, drawn anew
        table = times = None
        if c.fidelity and step % every == 0:
            tau = visits(c, c.K, draws.generator(c.seed, VISIT, step))
            table, times = descent(c, tau)

        # One update
        run.log(**update(x0, label, first, u, gpu.number(step, c.device), table, times))
        n = run.shows(20)  # from time to time a sheet of what it draws by now, in 20 steps
        if n:
            run.show(sample(c, ema.net, 0, n, min(20, c.T), sample_labels(c, n)))
    runs.end(c, run, c.steps or few(c))


# ============================================================================================= Main
def check(c):
    """Stop for what the flags together cannot mean."""
    if not c.fidelity:
        return
    if c.K > c.T:
        stop(f"--K {c.K} is more than --T {c.T}: choose from 1 to {c.T}")
    if c.K == 1 and c.score == "energy":
        stop("--score energy compares two chains, which for --K 1 have no noise to differ by: give "
             "--K 2 or more")
    if c.batch % c.part:
        stop(f"--part {c.part} does not divide --batch {c.batch} evenly: give a divisor")
    if c.part % processes.world():
        stop(f"--part {c.part} cannot be split evenly among {processes.world()} processes")
    if max(numbers_of(c, c.iters)) >= 2 ** 32:
        stop(f"--T {c.T} and --iters {c.iters} need more noises than there are: give fewer")


def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16, steps=20) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", update="flow". main has parsed them.
    """
    c = parsed or flags.settings("shortcut_mcmc", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c)
    return c, runs.restored(c, network(c), saved)


def main():
    c = flags.parse("shortcut_mcmc", FLAGS, RECIPES, __doc__)
    if c.train:
        train(c)
    if not (c.sample or c.evaluate):
        return
    c, net = load(parsed=c)
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
        metrics.write_result(c, metrics.judge(c, draw, steps))


if __name__ == "__main__":
    main()
