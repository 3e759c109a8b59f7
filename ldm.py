"""LDM: latent diffusion, an autoencoder and a diffusion model of what it makes of pictures.
Rombach et al. 2021 (arXiv:2112.10752). Both are trained here, from nothing.

    encoding   z = mu(x) + exp(l(x) / 2) nu       l: log-variance; or VQ: z(x), its nearest code
               | x - D(z) |^2 + kl KL(q(z | x), N(0, 1))                            (appendix G)
    noising    z_t = signal_t z0 + noise_t eps    z0 = (z - mean) / std, of each channel
    training   | target - net(z_t, t, y) |^2      target: eps or v;  y: words, if any        (2, 3)
    sampling   z0' = p_x z_t + p_out net(z_t, t)  never clipped: latents have no bounds
               z_s = c_x z_t + c_0 z0' + c_n eps  s < t;  at the end x = D(std z0 + mean)
    editing    z_t0 = signal z0(x) + noise eps    t0 = ceil(strength T), and down from there
    walking    z <- z + sqrt(2 eta) eps           decoded at each step;  eta: --walk-step

    python ldm.py --train                         # digits: the autoencoder, then the diffusion
    python ldm.py --sample --steps 20             # a sheet in the run
    python ldm.py --evaluate                      # FCD ... of samples, and of reconstructions
    python ldm.py --encode a.png b.png            # what the autoencoder keeps of pictures
    python ldm.py --train --autoencoder runs/ldm-digits --run runs/another   # stage 2 alone
    python ldm.py --train --data words            # pictures with captions, 12 minutes
    python ldm.py --sample --data words --prompt "a bold red seven on blue" --prompt "a small two"
    python ldm.py --sample --data words --image a.png --strength 0.5   # or --mask b.png: painted in
    python ldm.py --walk 100 --image a.png        # a GIF
    python ldm.py --train --latent kl --kl 1 --likelihood bernoulli --run runs/vae    # a plain VAE
    python ldm.py --sample --prior --run runs/vae                     # and its own samples

Digits on two cores of a Xeon: 2.5 minutes, FCD 1.6 (floor 0.16) at 50 steps, one run. At 16 x 16
little is won; at 64 x 64 a sample costs a thirtieth of ddim.py's (notebook). Words: 12 minutes;
of 1,000 samples colour, ground, size and place were as asked for in 99 to 100 %, the weight in
85 %, the digit in 50 %.

Left out of the paper: the perceptual and the adversarial term of the autoencoder's loss. They need
a network of others' weights and a discriminator; without them fine texture is blurred.
"""
import copy
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from common import early  # noqa: F401  first, since torch takes seconds
import torch
import torch.nn.functional as F
from torch import nn

from common import autoencoder, flags, gpu, metrics, pictures, processes, runs, sampling, text
from common import unet
from common.autoencoder import decoded, encode_all, encoded, latent_shape, measure
from common.data import POINTS, read_edit, read_pictures
from common.draws import (CODES, NOISE, POSTERIOR, START, STEP, WALK, drop_words, generator,
                          sample_labels)
from common.files import inputs, load_checkpoint, stop, written
from common.flags import option
from common.progress import progress
from common.schedules import SCHEDULES, alpha_bar, at, before, prediction, timesteps
from kernels.diffuse import add_noise, denoise_step
from kernels.noise import randn


# ============================================================================================ Flags
@dataclass
class Config:
    """This method's own. The groups are declared in common/flags.py, and valued in RECIPES."""
    latent: str = option("kl", "what keeps latents in bounds: a normal prior, or a codebook",
                         choices=("kl", "vq"), of_model=True)
    f: int = option(2, "pictures' side / latents' side", choices=(2, 4, 8), of_model=True)
    channels: int = option(4, "of the latents", low=1, of_model=True)
    kl: float = option(1e-5, "weight of the KL, where error and KL are both summed over a picture",
                       low=0, of_model=True)
    codes: int = option(128, "in the codebook", low=2, of_model=True)
    likelihood: str = option("l2", "of a picture, given its latent", of_model=True,
                             choices=("l2", "l1", "bernoulli"))
    width_ae: int = option(32, "channels of the autoencoder at full resolution, doubled at each "
                           "halving, at most four-fold", low=4, of_model=True)
    blocks_ae: int = option(1, "residual blocks a level of the autoencoder", low=1, high=64,
                            of_model=True)
    consistency: float = option(0.0, "weight of |z - e(D(z))|^2 beside the error: 1 / alpha of the "
                                "walk's loss", low=0, of_model=True)
    share: float = option(0.3, "of the minutes, for the autoencoder", above=0, high=0.95,
                          needs="minutes")
    autoencoder: str = option("", "take the autoencoder of this run, and train the diffusion alone",
                              idles="share latent f channels kl codes likelihood width_ae "
                              "blocks_ae consistency")
    captions: bool = option(False, "learn the words beside pictures too, for --prompt",
                            of_model=True)
    T: int = option(1000, "steps from data to noise", low=2, high=10 ** 7, of_model=True)
    schedule: str = option("cosine", "how alpha_bar falls from 1 to about 0", choices=SCHEDULES,
                           of_model=True)
    predict: str = option("v", "what the network's output is", choices=("eps", "v"), of_model=True)
    warmup: int = option(100, "updates over which the learning rate rises", low=0)
    steps: int = option(0, "network evaluations; default 50, or T where that is less",
                        "sample evaluate", low=1, high="T")
    eta: float = option(0.0, "noise of each step: 0 none (DDIM), 1 as much as DDPM",
                        "sample evaluate", low=0, high=1)
    prior: bool = option(False, "decode z ~ N(0, 1), as a plain VAE does: the baseline",
                         "sample evaluate", acts=False, idles="steps eta label guidance "
                         "interpolate encode prompt negative image walk")
    encode: tuple = option((), "pictures to encode and decode again (with no name: eight held-out "
                           "ones); --out .npz has the latents", "sample", part=Path, acts=True,
                           idles="n steps label guidance interpolate eta prompt negative image "
                           "walk")
    interpolate: bool = option(False, "eleven steps from each sample's noise to the next one's, a "
                               "row each", "sample", acts=True, idles="eta prompt image walk")
    prompt: tuple = option((), "what to draw, in words; several --prompt are a row each of --n "
                           "pictures, 8 by default, or with --walk share its walks", "sample",
                           part=str, repeated=True, acts=True, needs="captions")
    negative: str = option("", "what not to draw: words that guidance leads away from, in place of "
                           "none", "sample evaluate", needs="captions")
    image: str = option("", "a picture to begin with: changed by --strength, painted in by --mask, "
                        "walked around by --walk", "sample", acts=True)
    strength: float = option(0.0, "the share of T down from which --image is drawn anew; default "
                             "0.6, with --mask 1", "sample", above=0, high=1, needs="image")
    mask: str = option("", "a picture as large as --image: what is white, or transparent, is "
                       "painted anew, and black comes back to the byte", "sample", needs="image")
    walk: int = option(0, "steps of a random walk among the latents, from samples or from --image: "
                       "a .gif", "sample", above=0, high=10 ** 5, acts=True, idles="strength mask")
    walk_step: float = option(0.002, "eta of z + sqrt(2 eta) eps, where latents have variance 1",
                              "sample", above=0, needs="walk")


FLAGS = (Config, flags.Unet, flags.Training, flags.Labels, flags.Guidance)

RECIPES = {  # by data set: "" is all of them, "pictures" any path; each is laid over those above
    "": dict(width=128, multipliers=(1, 2, 2), blocks=1, attention=(16, 8), heads=4, batch=64,
             lr=5e-4, ema=0.9995, iters=100_000),
    "mnist": dict(width=64, attention=(7,), iters=20_000, ema=0.999),
    "fashion-mnist": dict(width=64, attention=(7,), iters=20_000, ema=0.999),
    "cifar10": dict(blocks=2, width_ae=64, batch=128, lr=2e-4, flip=True, iters=300_000,
                    ema=0.9999, warmup=1000),
    "celeba-hq": dict(size=256, f=8, width_ae=64, blocks=2, batch=32, lr=1e-4, ema=0.9999,
                      iters=500_000, kl=1e-6, warmup=1000, flip=True),  # a folder of this name
    "predict=eps": dict(schedule="linear"),  # at the cosine's end x0' is 20,000 times its error
    "pictures": dict(f=4, flip=True),
    # without a GPU what is above is hours; what is below knows a laptop
    "cpu": dict(size=0, f=2, width=48, multipliers=(1, 2), blocks=1, attention=(), width_ae=32,
                batch=32, lr=1e-3, ema=0.999, warmup=100, iters=100_000, minutes=10),
    "captions": dict(attention=(8,), guidance=2.0, flip=False),  # "left" is no "right"
    "digits": dict(f=2, channels=2, kl=1e-3, width=48, multipliers=(1, 2), attention=(), batch=64,
                   lr=2e-3, ema=0.995, share=0.15, iters=100_000, minutes=2.5),
    "words": dict(captions=True, f=2, channels=4, kl=1e-4, schedule="linear", width=48,
                  multipliers=(1, 2, 2), width_ae=16, batch=32, lr=1.5e-3, ema=0.996, share=0.12,
                  minutes=12),
    "stacked": dict(f=2, width=64, multipliers=(1, 2, 2), attention=(8,), batch=64, lr=1e-3,
                    ema=0.999, iters=20_000, minutes=0),
}

# ========================================================================================= Notation
# x (B, C, H, W) pictures in [-1, 1];  z (B, c, h, w) latents, h = H / f;  D: the decoder
# z0: latents scaled to mean 0 and variance 1 (of --init's data, if given);  z0' (in code z0_) what
# is predicted;  t (B,) in 1..T;  tokens (B, L): words as numbers, 0 for none (common/text.py)
# eps, nu ~ N(0, 1);  signal, noise (T + 1,): sqrt(alpha_bar), sqrt(1 - alpha_bar)
# tau_1 < ... < tau_K = T: the steps visited; from t = tau_i the next is s = tau_{i-1}, and s = 0,
# clean latents, at the end;  guess: what the network says of z_t;  v = signal eps - noise z0


# ======================================================================================= The method
class LatentDiffusion(nn.Module):
    """Autoencoder, U-Net, and the reader of words if any: one module, EMA and checkpoint."""

    def __init__(self, autoencoder, net, text=None):
        super().__init__()
        self.autoencoder, self.net, self.text = autoencoder, net, text

    def forward(self, z, time, label=None, tokens=None):
        context = None if tokens is None else self.text(tokens)
        return self.net(z, time, label, context=context)


def network(c):
    """The autoencoder, whose weights stand still, and the networks of its latents and of words."""
    ae = autoencoder.build(c).eval().requires_grad_(False)
    shape = latent_shape(c)
    least = 2 ** (len(c.multipliers) - 1)
    if shape[1] < least:
        stop(f"--f {c.f} leaves {shape[1]} x {shape[1]} latents, and --multipliers of "
             f"{len(c.multipliers)} levels need at least {least} x {least}: give fewer levels, "
             "or a larger --size")
    if not c.captions:
        return LatentDiffusion(ae, unet.build(c, shape, shape[0]))
    sides = [-(-shape[1] // 2 ** i) for i in range(len(c.multipliers))]
    if not {*sides} & {*c.attention}:
        stop(f"--captions needs maps that attend, and these have sides of {flags.text(sides)}: "
             f"give --attention {sides[-1]}, or --no-captions")
    reader = unet.TextEncoder(len(c.vocabulary), c.longest)
    return LatentDiffusion(ae, unet.build(c, shape, shape[0], context_dim=unet.CONTEXT), reader)


def autoencoder_loss(c, ae, x, nu):
    """What stage 1 minimises, and its parts to log.

    nu: N(0, 1), shaped as the latents: of KL alone. Error and KL are summed over a picture, and
    both divided by its number of values, so that `--kl 1 --likelihood bernoulli` is the negative
    ELBO per value, of pictures made black and white at random by their greys. VQ: the code's error
    and the commitment's are means (van den Oord 2017, eq. 3).

    Consistency is the loss of the walk that this project began with, over alpha: |D(z) - x|^2 +
    1 / alpha |z - e(D(z))|^2. There it read z = e(x) in place of z, of which its first term is 0.
    """
    mean, logvar = ae.encode(x)
    if c.latent == "kl":
        z = mean + (logvar / 2).exp() * nu
        kl = (mean.square() + logvar.exp() - 1 - logvar).sum() / 2 / x.numel()
        penalty, parts = c.kl * kl, dict(kl=kl)
    else:
        e, index = ae.quantise(mean)
        codebook = F.mse_loss(e, mean.detach())
        commitment = F.mse_loss(mean, e.detach())
        penalty, parts = codebook + COMMITMENT * commitment, dict(index=index)
        z = mean + (e - mean).detach()  # decodes codes; gradients pass as if there were none
    out = ae.decoder(z).float()
    if c.likelihood == "bernoulli":
        error = F.binary_cross_entropy_with_logits(out, (x + 1) / 2)
    else:
        error = (F.l1_loss if c.likelihood == "l1" else F.mse_loss)(out, x)
    if c.consistency:
        again, _ = ae.encode(ae.finished(out))
        parts |= dict(consistency=F.mse_loss(again, z))
        penalty = penalty + c.consistency * parts["consistency"]
    mse = F.mse_loss(ae.finished(out.detach()), x)
    return error + penalty, parts | dict(mse=mse)


def walk(c, tau):
    """Coefficients of the steps down tau (rising, ending at T), as ddim.py's: float32 (K, 5).

    p_x, p_out, c_x, c_0, c_n of the update in this file's head; eta 1 is DDPM's noise.
    """
    ab = alpha_bar(c.schedule, c.T)
    t, s = tau, before(tau)
    ab_t, ab_s = ab[t], ab[s]
    sigma = c.eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).sqrt()
    c_x = ((1 - ab_s - sigma ** 2).clamp(min=0) / (1 - ab_t)).sqrt()
    c_0 = ab_s.sqrt() - c_x * ab_t.sqrt()
    p_x, p_out = prediction(c.predict, ab_t, ab[t - 1])
    return torch.stack([p_x, p_out, c_x, c_0, sigma], 1).float()


def objective(c, out, z0, eps, signal, noise):
    """What stage 2 minimises (eq. 2). signal, noise: (B, 1, 1, 1), at t. A scalar."""
    target = eps if c.predict == "eps" else signal * eps - noise * z0
    return F.mse_loss(out.float(), target)


# =========================================================================================== Sample
def few(c, top=None):
    """Steps where none are asked for: all T would take minutes. top: where they begin."""
    return min(50, top or c.T)


def sample(c, net, first, n, steps=None, label=None, frames=None, z=None, prompt=""):
    """`steps` of the T steps down, and the decoder: samples first .. first + n - 1 of c.seed.

    label: int64 (n,) or None; prompt: a text, or n of them; frames: a list that receives each
    step's z0', decoded; z: the noise to start from, instead of the seed's. Returns (n, *c.shape),
    about in [-1, 1]. Of c are read what the model was trained with; shape, labels, vocabulary,
    device, precision; and seed, guidance, negative, eta.
    """
    z0 = latents(c, net, first, n, steps, label, frames, z, prompt)
    return decoded(c, net.autoencoder, net.autoencoder.unscaled(z0))


@torch.no_grad()
def latents(c, net, first, n, steps=None, label=None, frames=None, z=None, prompt="", known=None,
            kept=None):
    """The scaled latents (n, c, h, w) of `sample`, which has the arguments not named here.

    known: scaled latents (1, c, h, w) of a picture. They are noised to t0 = ceil(strength T), from
    where the steps go down; kept: bool (1, 1, h, w), where they stay what they are.
    """
    ae = net.autoencoder
    top = c.T if known is None else begins_at(c, kept is not None)
    steps = steps or few(c, top)
    tau = timesteps(top, steps)
    down_to = before(tau)
    table = walk(c, tau).to(c.device)
    tau = tau.to(c.device)
    which = torch.arange(first, first + n, device=c.device)
    seed = torch.tensor(c.seed, device=c.device)
    tokens, negative = read(c, prompt, n), read(c, c.negative, n)
    if c.captions and label is None and not prompt and not c.negative:
        c = copy.copy(c)
        c.guidance = 1.0  # by nothing: it would cost twice as much
    down = sampling.captured(denoise, c, net)  # on CUDA a graph, replayed
    if z is None:
        z = randn((n, *latent_shape(c)), c.seed, first, stream=START, device=c.device)  # z_T
    if known is not None:
        ab, eps = alpha_bar(c.schedule, c.T), z
        signal, noise = ab.sqrt().float(), (1 - ab).sqrt().float()
        z = signal[top] * known + noise[top] * eps
    for i in progress(range(steps)[::-1], f"samples {first} to {first + n - 1}"):
        z, z0_ = down(z, tau[i:i + 1], table[i], seed, which, label, tokens, negative)
        if kept is not None:  # always of the same eps; at s = 0 there is none of it
            s = down_to[i]
            z = torch.where(kept, signal[s] * known + noise[s] * eps, z)
        if frames is not None:
            frames.append(decoded(c, ae, ae.unscaled(z0_)).cpu())
    return z


def denoise(c, net, z, t, row, seed, which, label, tokens, negative):
    """From z_t to z_s, and z0' on the way: the two sampling lines of this file's head, in one pass.

    t (1,): the step; row (5,): its coefficients; seed () and which (n,): what eps is drawn by;
    tokens, negative (n, L): what is asked for, and what stands in its place for guidance.
    """
    given, without = dict(label=label), dict(label=c.labels)
    if tokens is not None:
        given, without = dict(tokens=tokens), dict(tokens=negative)
        if label is not None:
            given, without = given | dict(label=label), without | dict(label=c.labels)
    out, out_uncond = sampling.guided(c, net, z, t / c.T, given, without)
    return denoise_step(z, out, row, seed, which, t[0], STEP, out_uncond=out_uncond,
                        guidance=c.guidance, clip=False, return_x0=True)


def read(c, prompt, n):
    """The tokens (n, L) of a prompt, or of n of them; None for a model without words.

    ValueError for a word that the model does not know; "" is no word, and none is asked for.
    """
    prompts = [prompt] * n if isinstance(prompt, str) else list(prompt)
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} samples: give one, or one for each")
    said = sorted({*prompts} - {""})
    if c.captions:
        text.readable(said, c.vocabulary, c.longest)
        return text.numbers(prompts, c.vocabulary, c.longest).to(c.device)
    if said:
        raise ValueError(f"prompt {said[0]!r}: this model was trained without --captions")
    return None


def prior(c, net, first, n):
    """What the autoencoder alone draws: the pictures of z ~ N(0, 1), (n, *c.shape)."""
    z = randn((n, *latent_shape(c)), c.seed, first, stream=START, device=c.device)
    return decoded(c, net.autoencoder, z)


# ============================================================================================ Train
OF_AUTOENCODER = ("latent", "f", "channels", "kl", "codes", "likelihood", "width_ae", "blocks_ae",
                  "consistency")
OF_STAGE_1 = (*OF_AUTOENCODER, "iters", "minutes", "batch", "lr", "ema", "flip", "warmup", "seed")
COMMITMENT = 0.25  # beta of VQ, on the term that moves the encoder
WORDLESS, WORDS_LEFT_OUT = 0.1, 0.4  # captions that say nothing; of the others at most these words
REVIVE = 100  # updates after which codes that none of them took are set anew


def train(c):
    """Both stages, each in its folder, each resumable. The first ends once the second has begun.

    Once stage 2 has a checkpoint the autoencoder stands still: more minutes must not move the
    latents under a trained model.
    """
    check(c)
    data = runs.begin(c)  # sets c.shape, c.labels, c.vocabulary and the seed
    check_model(c)  # what is to be drawn in the end is not found out after the training
    path, first = c.run / "checkpoint.pt", c.run / "autoencoder"
    closed = path.exists() and not c.fresh
    begins_with = path if closed else c.init  # a checkpoint of both stages, or ""
    if begins_with:
        with inputs():
            of_stage_2(load_checkpoint(begins_with, (c.method,), flags.INIT), begins_with)
    if c.autoencoder:
        ae = borrowed(c, path if closed else None)
    with torch.device("meta"):
        network(c)  # ends the program, before anything is written, where the flags make none

    told = False
    if closed or c.init:
        ae = None  # the checkpoint has it
    elif not c.autoencoder:
        ae, told = train_autoencoder(c, data)
    if ae is not None:
        measure(c, ae, data)
    alone = (c.autoencoder or c.init) and not closed  # then stage 2 has all the minutes
    if alone and c.fresh and processes.rank() == 0:
        shutil.rmtree(first, ignore_errors=True)  # the old model's, of which nothing is left
    share = 1.0 if alone or not first.exists() else 1 - c.share
    train_diffusion(c, data, ae, share, told)


def train_autoencoder(c, data):
    """Stage 1, in the run's folder `autoencoder`. The autoencoder with its mean weights, ready."""
    c = copy.copy(c)
    whole, c.run = c.run / "checkpoint.pt", c.run / "autoencoder"
    ae = autoencoder.build(c).to(c.device)
    ema = runs.EMA(ae, c.ema)
    optimizer = torch.optim.Adam(ae.parameters(), c.lr, **gpu.adam(c.device))
    run = runs.Run(c, data, c.share, only=OF_STAGE_1, autoencoder=ae, ema=ema, optimizer=optimizer)
    if c.fresh and processes.rank() == 0:
        whole.unlink(missing_ok=True)  # else a killed run would go on with the old stage 2
    if c.compile:  # in place: the loss calls the two, not the whole
        ae.encoder.compile()
        ae.decoder.compile()
    if c.latent == "vq" and run.step == 0:  # codes begin as latents of pictures
        revive(c, ae, ema, data, 0, torch.ones(c.codes, dtype=torch.bool, device=c.device))

    def update(x, first, number):
        """What an update computes, of tensors. number: which update it is, () int64."""
        # What is lost on the way through the latents, which are drawn with noise nu
        nu = randn((len(x), *latent_shape(c)), c.seed, first, number, POSTERIOR, device=c.device)
        with flags.autocast(c):
            loss, parts = autoencoder_loss(c, ae, x, nu)

        # One step of Adam
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(ae)
        optimizer.step()
        if c.latent == "vq":
            parts |= use(ae, parts.pop("index"))
        ema.update(ae)
        return dict(loss=loss) | parts

    update = gpu.recorded(update, c)  # with --graph a CUDA graph

    for step in run:
        # Pictures
        x, _, first = run.batch(step)  # first: number of its first sample
        runs.set_rate(optimizer, c.lr * min(1, step / max(1, c.warmup)))

        # One update
        told = update(x, first, gpu.number(step, c.device))
        if c.latent == "vq" and step % REVIVE == 0:
            revive(c, ae, ema, data, step, ae.used == 0)
        run.log(**told)
        n = run.shows(1) // 2  # from time to time a sheet: each picture, and what became of it
        if n:
            x = data.batch(metrics.choice(len(data), n), c.device)[0]
            run.show(beside(x, reconstructed(c, ema.net, x)))
    if processes.rank() == 0:
        with inputs():
            pictures.curves(c.run)
    return ema.net, run.step > run.began


def use(ae, index):
    """Count the codes of an update's latents (B, h, w); how many of them it took, and perplexity.

    Perplexity, exp of the entropy, is as many codes as would be taken equally often. Pictures that
    are mostly background have a low one, and nothing is wrong with them.
    """
    index = index.flatten()
    count = torch.zeros_like(ae.used).scatter_add(0, index, torch.ones_like(index))
    count = processes.summed(count)  # not bincount, for which a GPU is waited for
    ae.used += count
    p = count.float() / count.sum()
    return dict(codes=(count > 0).sum(), perplexity=torch.special.entr(p).sum().exp())


@torch.no_grad()
def revive(c, ae, ema, data, step, dead):
    """Put the codes `dead` (codes,) where latents of pictures are, and count anew.

    The pictures are chosen for this update by the generator, the same in every process.
    """
    draw = generator(c.seed, CODES, step)
    chosen = torch.randint(len(data), (max(64, c.codes // 16),), generator=draw)
    z = encoded(c, ae, data.batch(chosen, c.device)[0]).movedim(1, -1).flatten(0, 2)
    places = torch.randint(len(z), (c.codes,), generator=draw).to(c.device)
    for codes in (ae.codes, ema.net.codes):
        codes.copy_(torch.where(dead[:, None], z[places].to(codes), codes))
    ae.used.zero_()


def train_diffusion(c, data, ae, share, told):
    """Stage 2: DDPM's training (as ddim.py's), of latents.

    ae: the trained autoencoder, or None where the checkpoint or --init has one; share: of the
    minutes; told: whether stage 1 has said what was read.
    """
    torch.manual_seed(c.seed)  # the network's first weights, whether stage 1 ran just now or not
    net = network(c).to(c.device)
    if ae is not None:
        net.autoencoder.load_state_dict(ae.state_dict())
    ae = net.autoencoder
    ema = runs.EMA(net, c.ema)
    optimizer = torch.optim.Adam(runs.learnable(net), c.lr, **gpu.adam(c.device))
    run = runs.Run(c, data, share, tell=not told, net=net, ema=ema, optimizer=optimizer)
    f = torch.compile(net) if c.compile else net

    ab = alpha_bar(c.schedule, c.T)
    signal = ab.sqrt().float().to(c.device)
    noise = (1 - ab).sqrt().float().to(c.device)

    def update(x, h, label, tokens, first, t, number):
        """What an update computes, of tensors. number: which update it is, () int64.

        h: what the encoder says of the pictures x, which are None then; or None: then it is asked.
        """
        # Latents of pictures: a draw of q(z | x), scaled
        nu = randn((len(t), *latent_shape(c)), c.seed, first, number, POSTERIOR, device=c.device)
        if h is None:
            with torch.no_grad(), flags.autocast(c):
                h = ae.encoder(x)
        z0 = ae.scaled(ae.drawn(h, nu))

        # Noised latents
        z_t, eps = add_noise(z0, signal[t], noise[t], c.seed, first, number, NOISE)

        # The network's guess, and how far it is off
        with flags.autocast(c):
            out = f(z_t, t / c.T, label, tokens)
        loss = objective(c, out, z0, eps, at(signal, t, z0), at(noise, t, z0))

        # One step of Adam
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.average_gradients(net)
        optimizer.step()
        ema.update(net)
        return dict(loss=loss)

    update = gpu.recorded(update, c)  # with --graph a CUDA graph

    for step in run:
        if step == run.began + 1:  # once, and here, where its time counts as training
            stored = encode_all(c, ae, data)

        # Data and times: a tenth of the labels is dropped, for guidance
        x, label, first = run.batch(step, drop=0.1)  # first: number of its first sample
        h = tokens = None
        index, mirrored = run.index(step)
        if stored is not None:
            h, x = stored[gpu.sent(index + len(data) * mirrored, c.device)], None
        if c.captions:
            tokens = gpu.sent(data.tokens(index), c.device)
            tokens = drop_words(tokens, c, step, WORDLESS, WORDS_LEFT_OUT)
        t = 1 + (run.spread(step) * c.T).long()  # each of 1..T as often as any other
        runs.set_rate(optimizer, c.lr * min(1, step / max(1, c.warmup)))

        # One update
        run.log(**update(x, h, label, tokens, first, t, gpu.number(step, c.device)))
        n = run.shows(20)  # from time to time a sheet of what it draws by now, in 20 steps
        if n:
            run.show(sample(c, ema.net, 0, n, min(20, c.T), sample_labels(c, n)))
    runs.end(c, run, c.steps or few(c))


# ============================================================================= Another run's
def borrowed(c, own=None):
    """The autoencoder of the run c.autoencoder, with its mean weights; sets c's flags of it.

    It is that of the run's model, or where there is none, of its first stage. own: the checkpoint
    that has it already, once there is one. Ends the program where it does not fit.
    """
    run = Path(c.autoencoder)
    path = next((file for file in (own, run / "checkpoint.pt") if file and file.exists()),
                run / "autoencoder" / "checkpoint.pt")
    with inputs():
        saved = load_checkpoint(path, (c.method,), f"--autoencoder {run} is not a run of ldm.py")
        shape = tuple(saved["data"]["shape"])
        if shape != c.shape:
            raise ValueError(f"{path} was trained on pictures of shape {shape}, and {c.data} has "
                             f"{c.shape}: give the same --size, or another autoencoder")
        for name in OF_AUTOENCODER:
            value = saved["config"].get(name, flags.default(c, name))  # a flag may be younger
            value = flags.checked(c.fields[name], value, path)
            if name in c.given and getattr(c, name) != value:
                raise ValueError(f"--{name.replace('_', '-')} {flags.text(getattr(c, name))} is "
                                 f"not what --autoencoder has, {flags.text(value)}: leave it out")
            setattr(c, name, value)
        ae = autoencoder.build(c)
        weights = dict(saved["ema"])["net"]
        whole = {name.removeprefix("autoencoder."): value for name, value in weights.items()
                 if name.startswith("autoencoder.")}
        runs.load_states(dict(autoencoder=whole or weights), path, autoencoder=ae)
    return ae.to(c.device).eval().requires_grad_(False)


# ============================================================================================ Edit
def begins_at(c, masked):
    """t0: the step that a picture is noised to, ceil(strength T)."""
    strength = c.strength or (1.0 if masked else 0.6)
    return max(1, math.ceil(round(strength * c.T, 6)))  # 0.07 * 100 is 7.000000000000001


def edit(c, net, x, painted, first, n, steps=None, label=None, frames=None, prompt=""):
    """Samples that begin with a picture x (1, C, H, W): (n, *c.shape), of `steps` evaluations.

    painted: bool (1, 1, H, W), what is painted anew, or None. The rest comes back as it is in x,
    and on the way down the latents of which no pixel is painted are the picture's own, noised.
    """
    ae = net.autoencoder
    known, kept = ae.scaled(encoded(c, ae, x)), None
    if painted is not None:
        kept = ~(F.max_pool2d(painted.float(), c.f) > 0)
    seen = None if frames is None else []
    z0 = latents(c, net, first, n, steps, label, seen, None, prompt, known, kept)
    y = decoded(c, ae, ae.unscaled(z0))
    if painted is None:
        painted = torch.ones_like(x[:, :1], dtype=torch.bool)
    if frames is not None:
        frames.extend(torch.where(painted.cpu(), frame, x.cpu()) for frame in seen)
    return torch.where(painted, y, x)


def begun(c):
    """--image as (1, C, H, W), and --mask as bool (1, 1, H, W); None where they are not given."""
    if not c.image:
        return None, None
    with inputs():
        x, painted = read_edit(c.image, c.mask, c.shape)
    return x.to(c.device), None if painted is None else painted.to(c.device)


# ============================================================================================ Walk
def wander(c, net, z):
    """--walk steps z_{t+1} = z_t + sqrt(2 eta) eps among latents z (n, c, h, w), scaled.

    Yields z itself and then each step, decoded: (n, *c.shape). After t steps the variance about the
    start is 2 eta t.
    """
    for step in range(c.walk + 1):
        if step:
            eps = randn(z.shape, c.seed, 0, step, WALK, device=c.device)
            z = z + math.sqrt(2 * c.walk_step) * eps
        yield decoded(c, net.autoencoder, net.autoencoder.unscaled(z))


def show_walk(c, net):
    """--walk as a .gif: --n walks beside each other, from samples or all from one picture."""
    n = c.n or 16
    if c.image:
        x, _ = begun(c)
        z = net.autoencoder.scaled(encoded(c, net.autoencoder, x)).expand(n, -1, -1, -1)
    else:
        prompts = [c.prompt[i % len(c.prompt)] for i in range(n)] if c.prompt else ""
        z = latents(c, net, 0, n, c.steps, sample_labels(c, n, c.label), prompt=prompts)
    frames = [x.cpu() for x in progress(wander(c, net, z), "walking", total=c.walk + 1)]
    if not frames[-1].isfinite().all():
        stop(f"--walk-step {c.walk_step} leaves what numbers can hold: give a smaller one")
    with inputs():
        path = pictures.save(c.out or c.run / "walk.gif", frames[-1], frames=frames)
    print(f"{n} walks of {c.walk} steps, to a variance of {2 * c.walk_step * c.walk:.3g} about "
          f"where they began (latents have 1): {path}")


# ============================================================================= Encode, interpolate
def reconstructed(c, ae, x):
    """Pictures x through the latents and back; no noise is added."""
    return decoded(c, ae, encoded(c, ae, x))


def beside(x, y):
    """Pictures x and y in turn: (2 n, C, H, W)."""
    return torch.stack([x, y], 1).flatten(0, 1)


def show_encoded(c, net):
    """What the autoencoder keeps of pictures: a sheet, or in an .npz the latents too.

    Latents are scaled, as the diffusion sees them; of KL they are the means.
    """
    ae = net.autoencoder
    with inputs():
        if c.encode:
            x = read_pictures(c.encode, c.shape, tell=True).to(c.device)
        else:
            test = runs.load_data(c, "test")
            x, _ = test.batch(metrics.choice(len(test), 8), c.device)
    z = encoded(c, ae, x)
    again = decoded(c, ae, z)
    values = f"{x[0].numel()} values in {z[0].numel()} latents"
    print(f"{len(x)} pictures, {values}; mean square error {F.mse_loss(again, x).item():.6f} (of "
          "values in -1..1)")
    path = Path(c.out or c.run / "encode.png")
    with inputs():
        if path.suffix == ".npz":
            save_latents(path, ae, z, again)
        else:
            pictures.save(path, torch.cat([x, again]).cpu(), columns=min(len(x), 16))
    print(path)


def save_latents(path, ae, z, again):
    """latents float32 (N, c, h, w), pictures uint8 (N, H, W, C); of VQ codes int64 (N, h, w)."""
    import numpy as np
    arrays = dict(latents=ae.scaled(z).cpu().numpy(),
                  pictures=pictures.to_uint8(again.cpu()).permute(0, 2, 3, 1).numpy())
    if ae.codes is not None:
        arrays["codes"] = ae.quantise(z)[1].cpu().numpy()
    with written(path) as file, open(file, "wb") as handle:
        np.savez(handle, **arrays)


def slerp(x, y, w):
    """Along the great circle from x to y, flattened samples (n, ...), at w in [0, 1] (D.5)."""
    norms = x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
    cosine = (x * y).flatten(1).sum(1) / norms
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-6)
    angle = angle.view(-1, *[1] * (x.ndim - 1))
    return (((1 - w) * angle).sin() * x + (w * angle).sin() * y) / angle.sin()


def interpolated(c, net, n, steps):
    """n rows of eleven samples, from the noise of sample i's latent to that of sample i + 1's."""
    z = randn((n + 1, *latent_shape(c)), c.seed, stream=START, device=c.device)
    label = sample_labels(c, n, c.label)
    columns = []
    for w in torch.linspace(0, 1, 11, device=c.device):
        columns.append(sample(c, net, 0, n, steps, label, z=slerp(z[:-1], z[1:], w)).cpu())
    with inputs():
        path = Path(c.out or c.run / "interpolate.png")
        if path.suffix == ".gif":  # which moves from each to the next
            print(pictures.save(path, columns[-1], frames=columns, columns=1))
        else:
            print(pictures.save(path, torch.stack(columns, 1).flatten(0, 1), columns=11))


# ============================================================================================= Main
def of_stage_2(saved, path):
    """ValueError where the checkpoint `saved`, read from `path`, holds an autoencoder alone."""
    if "net" not in saved:
        raise ValueError(f"{path} is of stage 1, an autoencoder alone: give the checkpoint.pt, or "
                         "--run, of the folder above it")


def check(c):
    """Stop for what the flags together cannot mean."""
    if c.name in POINTS:
        stop(f"ldm.py is for pictures, and {c.name} has points, which have no smaller map: give "
             "other --data, or use another script")
    for name, kind in (("kl", "kl"), ("codes", "vq")):
        if name in c.given and c.latent != kind:
            stop(f"--{name} does nothing with --latent {c.latent}: leave it out")
    brought = sorted(c.given & {"autoencoder", "kl", "likelihood", "share", "consistency"})
    if c.init and brought:
        stop(f"--init brings a trained autoencoder: leave out --{brought[0]}")
    if c.autoencoder and os.path.realpath(c.autoencoder) == os.path.realpath(c.run):
        stop("--autoencoder is the run itself: leave it out, or give another --run")
    if c.prior and c.latent == "vq":
        stop("--prior needs a model trained with --latent kl: codes have no prior")
    if c.prior and "encode" in c.given:
        stop("--encode does nothing with --prior: leave it out")
    if c.walk and c.out and not c.out.endswith(".gif"):
        stop(f"--out {c.out}: --walk writes a .gif")
    of_samples = sorted(c.given & {"prompt", "negative", "steps", "eta", "guidance", "label"})
    if c.walk and c.image and of_samples:
        stop(f"--{of_samples[0]} does nothing where --walk begins at --image: leave it out")
    many = c.n * max(1, len(c.prompt))
    if many > 256 and (c.walk or c.out.endswith(".gif")):
        stop(f"{many} samples: a .gif shows at most 256")
    missing = [path for path in (c.image, c.mask) if path and not Path(path).is_file()]
    if missing:
        stop(f"{missing[0]} is not there: give a picture file")


def check_model(c):
    """Stop for what the flags cannot mean with the model that they are for."""
    if c.negative and c.guidance == 1:
        stop("--negative does nothing with --guidance 1: give --guidance 2, say")
    negative = [c.negative] if "negative" in c.given else []
    with inputs():
        text.readable(c.prompt, c.vocabulary, c.longest, "--prompt")
        text.readable(negative, c.vocabulary, c.longest, "--negative")
    if c.image and not c.walk and c.steps > begins_at(c, c.mask):
        strength = f"--strength {c.strength}" if c.strength else "its strength"
        stop(f"--steps {c.steps}: {strength} leaves {begins_at(c, c.mask)} of T = {c.T} steps: "
             "give fewer, or more --strength")
    asked = c.prompt or c.negative or c.label or c.labels or c.evaluate
    if "guidance" in c.given and c.captions and c.guidance != 1 and not asked:
        stop("--guidance does nothing without --prompt or --negative: leave it out")
    if "encode" in c.given and c.out and Path(c.out).suffix not in (".png", ".npz"):
        stop(f"--out {c.out}: --encode writes a .png or an .npz")


def load(checkpoint="", *, parsed=None, **given):
    """c and the network that sample(c, net, 0, 16, steps=20) takes, from Python.

    given: flags by name that sampling reads, as device="cpu", eta=0.5. main has parsed them.
    """
    c = parsed or flags.settings("ldm", FLAGS, RECIPES, checkpoint=checkpoint, **given)
    c, saved = runs.trained(c)
    with inputs():
        of_stage_2(saved, c.checkpoint)
    return c, runs.restored(c, network(c), saved)


def show_samples(c, net):
    """--sample: a sheet, or what --out says; of several prompts a row each, of the same noise."""
    x, painted = begun(c)
    steps = 0 if c.prior else c.steps or few(c, begins_at(c, c.mask) if c.image else c.T)
    many = (c.n or 8) if c.prompt or c.image else c.sheet
    draw = sampling.Draw(c, many, c.label)
    if c.prompt and not c.label:
        draw.label = None  # the words say which
    for prompt in c.prompt or ("",):
        for first, n, label in draw:
            if c.prior:
                draw.keep(prior(c, net, first, n))
            elif c.image:
                draw.keep(edit(c, net, x, painted, first, n, steps, label, draw.frames, prompt))
            else:
                draw.keep(sample(c, net, first, n, steps, label, draw.frames, prompt=prompt))
    columns = many if c.prompt or c.image else None
    draw.save(steps, "edit.png" if c.image else "samples.png", columns)


def judge(c, net):
    """--evaluate. A model that reads captions is asked for what held-out pictures show."""
    metrics.prepare(c)
    many, steps = c.n or 1000, 0 if c.prior else c.steps or few(c)
    captions = held_out_captions(c, many) if c.captions and not c.prior else None
    if captions:
        print("each sample is asked for by the caption of a held-out picture", file=sys.stderr)
    draw = sampling.Draw(c, many)
    for first, n, label in draw:
        if c.prior:
            draw.keep(prior(c, net, first, n))
        elif captions:
            draw.keep(sample(c, net, first, n, steps, prompt=captions[first:first + n]))
        else:
            draw.keep(sample(c, net, first, n, steps, label))
    result = metrics.judge(c, draw, steps) | judge_reconstructions(c, net)
    if captions and c.name == "words":
        result |= metrics.as_asked(c, draw.samples(), captions)
    metrics.write_result(c, result)


def held_out_captions(c, n):
    """n captions of held-out pictures, always the same; each again where they are fewer."""
    test = runs.load_data(c, "test")
    chosen = metrics.choice(len(test), n).tolist()
    return [test.caption(chosen[i % len(chosen)]) for i in range(n)]


def judge_reconstructions(c, net):
    """What the autoencoder alone costs: error and FCD of held-out pictures, decoded again."""
    test = runs.load_data(c, "test")
    x, _ = test.batch(metrics.choice(len(test), 1000), c.device)
    again = reconstructed(c, net.autoencoder, x)
    result = {"reconstruction error": F.mse_loss(again, x).item()}
    with inputs():
        distance = metrics.fcd(c, pictures.to_uint8(again.cpu()))
    if distance is not None:
        result["reconstructions' FCD"] = distance
    return result


def main():
    c = flags.parse("ldm", FLAGS, RECIPES, __doc__)
    check(c)
    if c.train:
        train(c)
    if not (c.sample or c.evaluate):
        return
    c, net = load(parsed=c)
    check(c)
    check_model(c)
    if "encode" in c.given:
        show_encoded(c, net)
    elif c.interpolate:
        interpolated(c, net, c.n or 8, c.steps or few(c))
    elif c.walk:
        show_walk(c, net)
    elif c.sample:
        show_samples(c, net)
    if c.evaluate:
        judge(c, net)


if __name__ == "__main__":
    main()
