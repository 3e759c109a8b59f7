"""The networks: one U-Net for pictures in all six methods, and an MLP with its call for points.

    net(x, t, label=None, z=None, context=None)
        x        (B, C, H, W) pictures or latents, or (B, C) points
        t        (B,) time in [0, 1], from data to noise
        label    (B,) int64 in 0..classes, where the number `classes` itself means "no label"
        z        (B, z_dim) the latent of a GAN generator
        context  (B, L, context_dim) what to attend to
    returns (B, out_channels, H, W) or (B, out_channels).

A residual U-Net as in Ho 2020, with Nichol 2021's adaptive group norm: time scales and shifts the
second norm of each block. It knows no method; build() reads the flags of its parameters' names.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from common.files import inputs
from kernels.group_norm import GroupNorm


CONTEXT = 64  # what a word becomes


def build(c, shape, outputs, **more):
    """The network for data of this shape, (C, H, W) or (2,), by flags.Unet's flags and c.labels.

    outputs: channels of the result; more: further parameters of UNet or MLP, as z_dim. Ends the
    program with one line where the flags make no network.
    """
    def made():
        if len(shape) == 1:
            return MLP(shape[0], outputs, c.width, classes=c.labels, **more)
        return UNet(shape[0], outputs, shape[-1], c.width, c.multipliers, c.blocks, c.attention,
                    c.heads, c.labels, resample=c.resample, **more)
    net = fitting(c, made)
    # which spares a copy at each convolution
    return net if len(shape) == 1 else net.to(memory_format=torch.channels_last)


def fitting(c, make, width="--width"):
    """The module that make() returns, if there is memory for it; else the program ends with a line.

    Its parameters are counted first, without any memory: four bytes each to sample, and twenty to
    train, with the mean, the gradient and Adam's two moments; 24 on CUDA, for the mean's step.
    width: the flag that it grows with.
    """
    with inputs():
        many, there = 0, _memory(c.device)
        try:
            with torch.device("meta"):
                many = sum(p.numel() for p in make().parameters())
        except RuntimeError as fault:
            # a tensor of more bytes than can be counted; what else is wrong will show itself below
            many = math.inf if "overflow" in str(fault) else 0
        each = 24 if c.device.type == "cuda" else 20
        needs = (each if c.train else 4) * many
        if needs > there:
            raise ValueError(f"the network takes {needs / 1e9:,.0f} GB, and there are "
                             f"{there / 1e9:,.0f}: give a smaller {width}")
        return make()


def _memory(device):
    """Bytes of the device's memory, or of the machine's; inf where no one says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def fourier_time(t, dim):
    """Cosines and sines of 1000 t at dim/2 frequencies from 1 to 1e-4 radians (Vaswani 2017).

    t: (B,) in [0, 1], whole steps or between them. Returns float32 (B, dim).
    """
    i = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequency = torch.exp(i * (-math.log(10000) / (dim // 2)))
    angle = (1000 * t.float())[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def fourier_input(x, powers):
    """x and sin, cos(2^n pi x) for each n in powers, along the channels (Kingma 2021, 5.1)."""
    angles = [x * (2.0 ** n * math.pi) for n in powers]
    return torch.cat([x] + [f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


def zero(layer):
    """The layer with weights and bias of zero: a residual branch that starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def norm(channels):
    """GroupNorm over at most 32 groups of at least 4 channels."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels)


class Embedding(nn.Module):
    """What the picture does not hold, for every block to read: time, label, z, a context's mean.

    One vector (B, dim), after a SiLU.
    """

    def __init__(self, width, dim, classes=0, z_dim=0, z_layers=4, context_dim=0):
        super().__init__()
        if width % 2:
            raise ValueError(f"a width of {width} is odd (--width, --width-d): half of the time's "
                             "features are sines and half cosines")
        self.width, self.classes, self.z_dim = width, classes, z_dim
        self.time = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        if classes:
            self.label = nn.Embedding(classes + 1, dim)  # the last row is "no label"
        if context_dim:  # what attention to it need not find out (as Nichol 2021, GLIDE)
            self.context = nn.Linear(context_dim, dim)
            nn.init.normal_(self.context.weight, std=0.3)  # as loud as a label: else hardly heard
        if z_dim:  # StyleGAN's mapping network, as DDGAN uses it (Xiao 2021, appendix C)
            layers = [nn.Linear(z_dim, dim)]
            for _ in range(z_layers - 1):
                layers += [nn.SiLU(), nn.Linear(dim, dim)]
            self.mapping = nn.Sequential(*layers)

    def forward(self, t, label=None, z=None, context=None):
        if label is not None and not self.classes:
            raise ValueError("this network was built without labels")
        if (z is not None) != (self.z_dim > 0):
            raise ValueError(f"z must be given exactly where z_dim is: z_dim is {self.z_dim}")
        e = self.time(fourier_time(t, self.width).to(self.time[0].weight.dtype))
        if self.classes:
            if label is None:
                label = torch.full_like(t, self.classes, dtype=torch.long)
            e = e + self.label(label)
        if hasattr(self, "context") and context is not None:
            e = e + self.context(context.sum(1) / context.shape[1] ** 0.5)
        if self.z_dim:  # z on the sphere of radius sqrt(z_dim): its length carries nothing
            e = e + self.mapping(z * z.square().mean(1, keepdim=True).add(1e-8).rsqrt())
        return F.silu(e)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, then norm scaled and shifted by the embedding, SiLU, conv.

    resample -1 or 1 halves or doubles the map inside the block and on its skip, as in BigGAN. With
    dim 0 there is no embedding: the autoencoder's blocks know no time.
    """

    def __init__(self, c_in, c_out, dim, resample=0):
        super().__init__()
        self.resample = resample
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(dim, 2 * c_out) if dim else None
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, e=None, size=None):
        h = self.norm1(x)
        if self.resample:
            h, x = resize(h, self.resample, size), resize(x, self.resample, size)
        h = self.conv1(h)
        if self.scale_shift is None:
            return self.skip(x) + self.conv2(self.norm2(h))
        scale, shift = self.scale_shift(e).chunk(2, 1)
        return self.skip(x) + self.conv2(self.norm2(h, scale, shift))


def resize(x, direction, size=None):
    """Half the map by 2 x 2 means (odd edges kept), or repeat it to `size` (H, W)."""
    if direction < 0:
        return F.avg_pool2d(x, 2, ceil_mode=True)
    return F.interpolate(x, size=size, mode="nearest")


class Resample(nn.Module):
    """Half the map by a strided convolution.

    In direction 1 it is repeated to `size` (H, W) and smoothed by a convolution.
    """

    def __init__(self, c_in, c_out, direction):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2 if direction < 0 else 1, padding=1)

    def forward(self, x, e=None, size=None):
        return self.conv(x if size is None else resize(x, 1, size))


class Attention(nn.Module):
    """Attention with several heads among the pixels of a map, and then from pixels to a context.

    side: of the map, each of whose places asks the context with a vector of its own: "top left" is
    for some of them, and a convolution hardly knows where it is.
    """

    def __init__(self, channels, heads, context_dim=0, side=0):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(norm(channels).groups, channels, silu=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))
        if context_dim:
            self.cross_norm, self.q = nn.LayerNorm(channels), nn.Linear(channels, channels)
            self.place = nn.Parameter(torch.randn(side * side, channels))
            self.kv = nn.Linear(context_dim, 2 * channels)
            self.cross_out = zero(nn.Linear(channels, channels))

    def attend(self, q, k, v):
        # (B, heads, L, channels / heads)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        if q.is_cpu and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # PyTorch's backward pass takes three to ten times as long there in bf16 as in fp32
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x, context=None):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = self.out(self.attend(*self.qkv(h).chunk(3, -1)))
        if hasattr(self, "kv"):
            if context is None:
                raise ValueError("this network attends to a context: give context (B, L, "
                                 "context_dim)")
            q = self.q(self.cross_norm(h + x.flatten(2).transpose(1, 2)) + self.place)
            h = h + self.cross_out(self.attend(q, *self.kv(context).chunk(2, -1)))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual block, and attention after it where there is one."""

    def __init__(self, block, attention):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x, e, context=None):
        h = self.block(x, e)
        return h if self.attention is None else self.attention(h, context)


class UNet(nn.Module):
    """The one U-Net. See the top of this file for its call.

    in_channels   channels of x
    out_channels  of the result, default the same (twice as many for a learned variance)
    size          side of x, which places the attention
    width         channels at full resolution; level i has width * multipliers[i] at size / 2^i
    blocks        residual blocks a level, on the way down and on the way up; each pair shares a
                  skip connection
    attention     sides that attend, e.g. (16, 8), with `heads` heads; the middle attends too where
                  any level does
    classes       number of labels
    z_dim         size of z; z_layers: depth of its mapping network
    context_dim   of the context's vectors
    fourier       powers n of sin, cos(2^n pi x) fed beside x, e.g. (7, 8)
    resample      "conv" strided and plain convolutions between levels, or "biggan" inside residual
                  blocks
    """

    def __init__(self, in_channels, out_channels=None, size=16, width=64, multipliers=(1, 2, 2),
                 blocks=2, attention=(8,), heads=4, classes=0, z_dim=0, z_layers=4, context_dim=0,
                 fourier=(), resample="conv"):
        super().__init__()
        if resample not in ("conv", "biggan"):
            raise ValueError(f"unknown resample {resample!r}: choose conv or biggan")
        if not multipliers:
            raise ValueError("--multipliers names no level: give at least one, e.g. 1,2")
        least = 2 ** (len(multipliers) - 1)
        if size < least:
            raise ValueError(f"{len(multipliers)} levels need at least {least} pixels a side, not "
                             f"{size}")
        dim = 4 * width
        self.fourier = tuple(fourier)
        self.embedding = Embedding(width, dim, classes, z_dim, z_layers, context_dim)
        self.first = nn.Conv2d(in_channels * (1 + 2 * len(self.fourier)), width, 3, padding=1)

        def attend(channels, side, wanted):
            if not wanted:
                return None
            if channels % heads:
                raise ValueError(f"{channels} channels cannot be split among {heads} heads: change "
                                 "--heads or --width")
            return Attention(channels, heads, context_dim, side)

        def between(channels, c, direction):
            if resample == "conv":
                return Resample(channels, c, direction)
            return Block(channels, c, dim, direction)

        # channels and side of each level
        levels = [(width * m, -(-size // 2 ** i)) for i, m in enumerate(multipliers)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels = width
        for c, side in levels:
            if len(self.down):
                self.down.append(between(channels, channels, -1))
            for _ in range(blocks):
                self.down.append(Stage(Block(channels, c, dim), attend(c, side, side in attention)))
                channels = c
        attends = any(side in attention for _, side in levels)
        self.middle = nn.ModuleList([
            Stage(Block(channels, channels, dim), attend(channels, levels[-1][1], attends)),
            Stage(Block(channels, channels, dim), None)])
        for c, side in reversed(levels):
            if len(self.up):
                self.up.append(between(channels, c, 1))
                channels = c
            for _ in range(blocks):
                block = Block(channels + c, c, dim)
                self.up.append(Stage(block, attend(c, side, side in attention)))
                channels = c
        self.last_norm = norm(channels)
        self.last = zero(nn.Conv2d(channels, out_channels or in_channels, 3, padding=1))

    def forward(self, x, t, label=None, z=None, context=None):
        e = self.embedding(t, label, z, context)
        h, skips = self.first(fourier_input(x, self.fourier)), []
        # every stage leaves its map for the stage of the same size on the way up
        for layer in self.down:
            if isinstance(layer, Stage):
                h = layer(h, e, context)
                skips.append(h)
            else:
                h = layer(h, e)
        for layer in self.middle:
            h = layer(h, e, context)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = layer(torch.cat([h, skips.pop()], 1), e, context)
            else:
                h = layer(h, e, skips[-1].shape[2:])
        return self.last(self.last_norm(h))


class MLP(nn.Module):
    """Residual MLP for points, with the U-Net's call.

    in_channels is the dimension of a point; depth counts hidden blocks.
    """

    def __init__(self, in_channels, out_channels=None, width=128, depth=4, classes=0, z_dim=0,
                 z_layers=4, context_dim=0, fourier=()):
        super().__init__()
        self.fourier = tuple(fourier)
        self.embedding = Embedding(width, width, classes, z_dim, z_layers)
        self.first = nn.Linear(in_channels * (1 + 2 * len(self.fourier)) + context_dim, width)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm=nn.LayerNorm(width, elementwise_affine=False),
            scale_shift=nn.Linear(width, 2 * width),
            hidden=nn.Linear(width, 2 * width),
            out=zero(nn.Linear(2 * width, width)))) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width)
        self.last = zero(nn.Linear(width, out_channels or in_channels))

    def forward(self, x, t, label=None, z=None, context=None):
        e = self.embedding(t, label, z)
        x = fourier_input(x, self.fourier)
        if context is not None:  # a point is one pixel: it attends to the mean
            x = torch.cat([x, context.mean(1)], 1)
        h = self.first(x)
        for block in self.blocks:
            scale, shift = block["scale_shift"](e).chunk(2, 1)
            hidden = block["hidden"](block["norm"](h) * (1 + scale) + shift)
            h = h + block["out"](F.silu(hidden))
        return self.last(self.last_norm(h))


class TextEncoder(nn.Module):
    """Tokens (B, length), as common/text.py has them, to a context (B, length, dim).

    A small transformer; words: of the vocabulary. It is trained with the network that attends to
    it. "No word" has a vector of its own, so that nothing need be masked.
    """

    def __init__(self, words, length, dim=CONTEXT, layers=2, heads=4):
        super().__init__()
        self.word = nn.Embedding(words + 1, dim)
        self.place = nn.Parameter(torch.randn(length, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim),
                                            enable_nested_tensor=False)

    def forward(self, tokens):
        with torch.autocast(tokens.device.type, enabled=False):  # so small a network in fp32
            return self.layers(self.word(tokens) + self.place)
