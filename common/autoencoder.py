"""The autoencoder of latent diffusion: pictures to small maps of latents, and back.

    mean, logvar = ae.encode(x)     x (B, C, H, W) in [-1, 1] -> (B, channels, H / f, W / f), twice
    e, index = ae.quantise(z)       the nearest codes, and which they are: VQ alone
    x = ae.decode(z)                (B, channels, H / f, W / f) -> (B, C, H, W), about in [-1, 1]

It stands on the U-Net's blocks, without their time. It knows no loss and no run; build() and what
follows it read the flags of ldm.py.
"""
import torch
from torch import nn

from common import flags
from common.files import stop
from common.metrics import choice
from common.progress import progress
from common.unet import Block, Resample, fitting, norm

CHUNK = 2 ** 18  # pixels that are encoded or decoded at once: large maps take much memory
KEPT = 2 ** 28  # bytes of latents that training keeps, rather than encode pictures at each update


def _levels(width, f):
    """Channels at full resolution and after each halving: doubled each time, at most four-fold."""
    return [width * min(4, 2 ** i) for i in range(f.bit_length())]


class Encoder(nn.Sequential):
    """x (B, C, H, W) to (B, outputs, H / f, W / f)."""

    def __init__(self, channels, outputs, width, f, blocks):
        layers, c = [nn.Conv2d(channels, width, 3, padding=1)], width
        for i, wider in enumerate(_levels(width, f)):
            if i:
                layers.append(Resample(c, c, -1))
            for _ in range(blocks):
                layers.append(Block(c, wider, 0))
                c = wider
        layers += [norm(c), nn.Conv2d(c, outputs, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """z (B, channels, h, w) to (B, outputs, f h, f w)."""

    def __init__(self, channels, outputs, width, f, blocks):
        levels = _levels(width, f)[::-1]
        layers, c = [nn.Conv2d(channels, levels[0], 3, padding=1)], levels[0]
        for i, narrower in enumerate(levels):
            if i:
                layers.append(Double(c, narrower))
                c = narrower
            layers += [Block(c, c, 0) for _ in range(blocks)]
        layers += [norm(c), nn.Conv2d(c, outputs, 3, padding=1)]
        super().__init__(*layers)


class Double(nn.Module):
    """Each pixel becomes 2 x 2, from four times as many channels of a convolution (Shi 2016)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, 4 * c_out, 3, padding=1)

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.conv(x), 2)


class Autoencoder(nn.Module):
    """Encoder, decoder, codebook if any, and the scale of the latents.

    in_channels  C of the pictures
    channels     of the latents
    f            pictures' side / latents' side: 2, 4 or 8
    codes        how many there are in the codebook; 0: a normal posterior instead (KL)
    width        channels at full resolution, doubled at each halving, at most four-fold
    blocks       residual blocks a level, both ways
    squash       the decoder's output a becomes 2 sigmoid(a) - 1, a Bernoulli's mean in [-1, 1]

    Buffers: mean, std (channels,) of the latents, for the diffusion to work at unit variance; used
    (codes,), how often each code was taken since the training last looked.
    """

    def __init__(self, in_channels, channels, f, codes=0, width=32, blocks=1, squash=False):
        super().__init__()
        self.channels, self.f, self.squash = channels, f, squash
        outputs = channels if codes else 2 * channels
        self.encoder = Encoder(in_channels, outputs, width, f, blocks)
        self.decoder = Decoder(channels, in_channels, width, f, blocks)
        self.codes = nn.Parameter(torch.randn(codes, channels)) if codes else None
        self.register_buffer("used", torch.zeros(codes, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def encode(self, x):
        """Mean and log-variance of q(z | x), float32; of VQ the latent before its code, and None.

        The log-variance is kept within -30 and 20, where its exponential means something.
        """
        return self.posterior(self.encoder(x))

    def posterior(self, h):
        """Mean and log-variance from what the encoder says; of VQ h itself, and None."""
        h = h.float()
        if self.codes is not None:
            return h, None
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def drawn(self, h, nu):
        """A draw of q(z | x) from the encoder's word and nu ~ N(0, 1); of VQ there is but one z."""
        mean, logvar = self.posterior(h)
        return mean if logvar is None else mean + (logvar / 2).exp() * nu

    def quantise(self, z):
        """The code nearest to each latent, as z is shaped, and its number (B, h, w) int64."""
        e = self.codes.float()
        z = z.float().movedim(1, -1)
        with torch.autocast(z.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for all
            index = (e.square().sum(1) - 2 * z @ e.t()).argmin(-1)
        return e[index].movedim(-1, 1), index

    def decode(self, z):
        """Pictures of latents, float32; of VQ their codes are decoded."""
        if self.codes is not None:
            z, _ = self.quantise(z)
        return self.finished(self.decoder(z))

    def finished(self, out):
        """The decoder's output as a picture, float32."""
        out = out.float()
        return (out / 2).tanh() if self.squash else out  # 2 sigmoid(a) - 1 = tanh(a / 2)

    def scaled(self, z):
        """Latents as the diffusion sees them: mean 0 and variance 1 in each channel."""
        return (z - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def unscaled(self, z):
        """The inverse of `scaled`."""
        return z * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)


def build(c):
    """The autoencoder by the flags, for pictures of c.shape."""
    ae = fitting(c, lambda: Autoencoder(
        c.shape[0], c.channels, c.f, c.codes if c.latent == "vq" else 0, c.width_ae, c.blocks_ae,
        c.likelihood == "bernoulli"), "--width-ae")
    return ae.to(memory_format=torch.channels_last)


def latent_shape(c):
    """(c, h, w) of the latents of c.shape's pictures. Ends the program where f does not divide."""
    side = c.shape[-1]
    if side % c.f:
        stop(f"--f {c.f} does not divide the pictures' side of {side}: give --size "
             f"{max(1, side // c.f) * c.f}, or another --f")
    return c.channels, side // c.f, side // c.f


def chunk(c):
    """How many pictures are encoded or decoded at once."""
    return max(1, CHUNK // c.shape[-1] ** 2)


@torch.no_grad()
def encoded(c, ae, x):
    """Latents z of pictures x (n, C, H, W), a chunk at a time: of KL the means of q(z | x).

    Of VQ they are what stands before the codes.
    """
    parts = []
    for part in x.split(chunk(c)):
        with flags.autocast(c):
            parts.append(ae.encode(part)[0])
    return torch.cat(parts)


@torch.no_grad()
def encode_all(c, ae, data):
    """What the encoder says of all pictures, and with --flip then of their mirror images.

    (N or 2 N, ..., h, w) on c.device. None where that takes more than KEPT bytes, or more time than
    so few updates are worth.
    """
    many = 2 if c.flip else 1
    channels, h, w = latent_shape(c)
    numbers = (channels if c.latent == "vq" else 2 * channels) * h * w
    pictures = many * len(data)
    if 4 * numbers * pictures > KEPT or 2 * pictures > c.iters * c.batch:
        return None
    parts = []
    for mirrored in (False, True)[:many]:
        for index in progress(torch.arange(len(data)).split(chunk(c)), "latents of all pictures"):
            x, _ = data.batch(index, c.device, torch.full(index.shape, mirrored))
            with flags.autocast(c):
                parts.append(ae.encoder(x).float())
    return torch.cat(parts)


@torch.no_grad()
def decoded(c, ae, z):
    """Pictures (n, C, H, W) of latents z, a chunk at a time."""
    parts = []
    for part in z.split(chunk(c)):
        with flags.autocast(c):
            parts.append(ae.decode(part))
    return torch.cat(parts)


@torch.no_grad()
def measure(c, ae, data):
    """Set the mean and std of each channel of z, over 2,000 pictures that are always the same.

    The variance is that of the means and the mean of the posterior's. A channel that the
    autoencoder leaves alone keeps a std of at least 1e-4.
    """
    index = choice(len(data), 2000)
    means, variances = [], []
    for part in index.split(chunk(c)):
        x, _ = data.batch(part, c.device)
        with flags.autocast(c):
            h = ae.encoder(x)
        mean, logvar = ae.posterior(h)
        means.append(mean.cpu().double())
        variances.append((torch.zeros_like(mean) if logvar is None else logvar.exp()).cpu())
    z = torch.cat(means)
    variance = z.var((0, 2, 3), correction=0) + torch.cat(variances).double().mean((0, 2, 3))
    ae.mean.copy_(z.mean((0, 2, 3)))
    ae.std.copy_(variance.sqrt().clamp(min=1e-4))
