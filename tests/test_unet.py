"""The networks: shapes, what reaches what, and each part against its definition."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ddpm
from common import files
from common.unet import MLP, Attention, UNet, build, fourier_input, fourier_time
from conftest import settings


def filled(net, seed=0):
    """Give the zero-initialised layers values, so that every path shows in the output."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.detach().abs().max() == 0:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return net


def unet(size=8, **more):
    torch.manual_seed(0)
    small = dict(width=8, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)
    return filled(UNet(2, size=size, **small | more))


@pytest.mark.parametrize("resample", ["conv", "biggan"])
@pytest.mark.parametrize("size", [8, 9, 15, 28])
def test_any_size_keeps_its_shape(size, resample):
    net = unet(size, multipliers=(1, 2, 2), resample=resample, out_channels=4)
    out = net(torch.randn(3, 2, size, size), torch.tensor([0.001, 0.5, 1.0]))
    assert out.shape == (3, 4, size, size)


def test_starts_as_zero():
    """Zero-initialised last layers: a new network says nothing.

    And each residual branch adds nothing.
    """
    net = UNet(2, size=8, width=8, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)
    assert net(torch.randn(1, 2, 8, 8), torch.full((1,), 0.001)).abs().max() == 0
    for block in net.modules():
        if type(block).__name__ == "Block":
            assert block.conv2.weight.abs().max() == 0


def test_samples_of_a_batch_do_not_meet():
    net, x = unet(classes=3).double(), torch.randn(4, 2, 8, 8).double()
    t = torch.tensor([0.001, 0.02, 0.3, 0.999])
    label = torch.tensor([0, 1, 2, 3])
    whole = net(x, t, label)
    for i in range(4):
        assert_close(net(x[i:i + 1], t[i:i + 1], label[i:i + 1]), whole[i:i + 1])


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_every_input_matters(kind):
    """Time, label, z, context and x each change the output, and receive a gradient."""
    options = dict(classes=3, z_dim=5, context_dim=6, fourier=(1, 2))
    torch.manual_seed(0)
    net = unet(**options) if kind == "unet" else filled(MLP(2, width=16, depth=2, **options))
    x = torch.randn(2, 2, 8, 8) if kind == "unet" else torch.randn(2, 2)
    given = dict(x=x, t=torch.tensor([0.01, 0.9]), label=torch.tensor([0, 1]),
                 z=torch.randn(2, 5), context=torch.randn(2, 7, 6))
    others = dict(x=x + 0.5, t=given["t"] + 0.05, label=torch.tensor([3, 2]), z=-given["z"],
                  context=-given["context"])
    before = net(**given)
    for name, other in others.items():
        changed = (net(**given | {name: other}) - before).abs().flatten(1).amax(1)
        assert (changed > 1e-4).all(), name
    net(**given).square().sum().backward()
    without = [name for name, p in net.named_parameters()
               if p.grad is None or p.grad.abs().max() == 0]
    assert not without, without


def test_no_label_is_the_last_one():
    net, x, t = unet(classes=3), torch.randn(2, 2, 8, 8), torch.full((2,), 0.001)
    assert_close(net(x, t), net(x, t, torch.tensor([3, 3])))


def test_time_may_be_continuous():
    net, x = unet(), torch.randn(1, 2, 8, 8)
    a, b, c = (net(x, torch.tensor([t])) for t in (0.5, 0.50025, 0.501))
    assert 0 < (a - b).abs().max() < (a - c).abs().max()


def test_fourier_features_against_numpy():
    t = np.array([0, 1, 123.5, 1000])
    angle = t[:, None] * np.exp(-np.log(10000) * np.arange(8) / 8)
    wanted = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], 1)).float()
    assert_close(fourier_time(torch.from_numpy(t / 1000).float(), 16), wanted, atol=1e-4, rtol=0)
    x = torch.randn(2, 1, 3, 3)
    f = fourier_input(x, (7, 8))
    assert f.shape == (2, 5, 3, 3)
    wanted = torch.sin(2 ** 7 * torch.pi * x.double())
    assert_close(f[:, 1:2].double(), wanted, atol=1e-4, rtol=0)


def test_attention_against_a_loop():
    """One head at a time, pixel by pixel, in float64."""
    torch.manual_seed(1)
    layer = filled(Attention(8, 2)).double()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    h = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(h).chunk(3, -1)
    rows = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 2).softmax(-1)
        rows.append(weights @ v[..., head])
    expected = x + layer.out(torch.cat(rows, -1)).transpose(1, 2).view_as(x)
    assert_close(layer(x), expected)


def test_attention_to_a_context_knows_its_place():
    """Each pixel asks with what it is and where it is; one head at a time, in float64."""
    torch.manual_seed(1)
    layer = filled(Attention(8, 2, 6, side=3)).double()
    x, context = torch.randn(2, 8, 3, 3).double(), torch.randn(2, 5, 6).double()
    alone = Attention(8, 2)
    alone.load_state_dict({name: value for name, value in layer.state_dict().items()
                           if name in alone.state_dict()})
    h = alone.double()(x).flatten(2).transpose(1, 2)  # what attention to itself has made of x
    asks = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    q = layer.q(asks * layer.cross_norm.weight + layer.cross_norm.bias + layer.place)
    k, v = layer.kv(context).chunk(2, -1)
    rows = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 2).softmax(-1)
        rows.append(weights @ v[..., head])
    expected = (h + layer.cross_out(torch.cat(rows, -1))).transpose(1, 2).view_as(x)
    assert_close(layer(x, context), expected)
    # the same picture moved by a pixel asks other questions
    assert not torch.allclose(layer(x.roll(1, 3), context), layer(x, context).roll(1, 3))


def test_attention_in_bf16_without_a_gpu_has_bf16_s_error():
    """It is computed in fp32 there for its gradient: no more error than plain bf16 has."""
    torch.manual_seed(2)
    layer = filled(Attention(16, 2))
    x = torch.randn(4, 16, 4, 4)
    found = {}
    for kind in ("double", "bf16"):
        net = Attention(16, 2)
        net.load_state_dict(layer.state_dict())
        net, y = (net.double(), x.double()) if kind == "double" else (net, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            out = net(y)
        out.double().square().sum().backward()
        found[kind] = torch.cat([p.grad.double().flatten() for p in net.parameters()])
    off = (found["bf16"] - found["double"]).norm() / found["double"].norm()
    assert off < 2 ** -6, off


def test_wrong_builds_and_calls_are_named():
    for make, words in ((lambda: unet(heads=3), "heads"),
                        (lambda: unet(resample="wavelet"), "conv or biggan"),
                        (lambda: unet(size=2, multipliers=(1, 1, 1)), "at least 4 pixels")):
        with pytest.raises(ValueError, match=words):
            make()
    x, t = torch.randn(1, 2, 8, 8), torch.full((1,), 0.001)
    for net, more, words in ((unet(), dict(label=torch.tensor([0])), "without labels"),
                             (unet(z_dim=4), {}, "z_dim is 4"),
                             (unet(context_dim=4), {}, "context")):
        with pytest.raises(ValueError, match=words):
            net(x, t, **more)


# ------------------------------------------------------------------------------ by the flags' names
def same(net, by_hand):
    """Whether both have the same parameters by name and shape, of one type."""
    shapes = [[(name, p.shape) for name, p in n.state_dict().items()] for n in (net, by_hand)]
    return type(net) is type(by_hand) and shapes[0] == shapes[1]


def test_build_makes_an_mlp_for_points():
    c = settings(ddpm, data="swirl", width=16, labels=3)
    assert same(build(c, (2,), 4), MLP(2, 4, 16, classes=3))
    assert same(build(c, (2,), 2, z_dim=5, depth=2), MLP(2, 2, 16, 2, classes=3, z_dim=5))


@pytest.mark.parametrize("resample", ["conv", "biggan"])
def test_build_makes_a_channels_last_unet_for_pictures(resample):
    c = settings(ddpm, width=8, multipliers=(1, 2), blocks=2, attention=(4,), heads=2, labels=3,
                 resample=resample)
    net = build(c, (3, 8, 8), 6, z_dim=5, fourier=(1,))
    by_hand = UNet(in_channels=3, out_channels=6, size=8, width=8, multipliers=(1, 2), blocks=2,
                   attention=(4,), heads=2, classes=3, z_dim=5, fourier=(1,), resample=resample)
    assert same(net, by_hand)
    for p in net.parameters():
        assert p.ndim < 4 or p.is_contiguous(memory_format=torch.channels_last)
    assert not net.first.weight.is_contiguous()
    by_hand.load_state_dict(filled(net).state_dict())
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    z = torch.randn(2, 5)
    out = net(x, t, label, z)
    assert out.shape == (2, 6, 8, 8)
    assert_close(out, by_hand(x, t, label, z), atol=1e-4, rtol=1e-4)


def test_build_ends_the_program_where_the_flags_make_no_network(monkeypatch, capsys):
    c = settings(ddpm, width=8, multipliers=(1, 2), attention=(4,), heads=3)
    with pytest.raises(ValueError, match="--heads"):
        build(c, (1, 8, 8), 1)
    monkeypatch.setattr(files, "program", "ddpm.py")
    with pytest.raises(SystemExit) as end:
        build(c, (1, 8, 8), 1)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("ddpm.py: error: ") and "--heads" in told and told.count("\n") == 1
