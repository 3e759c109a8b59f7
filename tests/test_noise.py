"""kernels/noise.py: known answers, invariance, statistics, and the Triton kernel in processes of
its own."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interp_noise_diffuse import normals, ulps, words

from kernels import noise
from kernels.noise import philox, randn

ROOT = Path(__file__).resolve().parent.parent
SEED = 0x0123456789ABCDEF


@pytest.mark.parametrize("counter, key, expected", [  # Random123, kat_vectors
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_known_answers(counter, key, expected):
    counter, key, expected = ([int(w, 16) for w in line.split()]
                              for line in (counter, key, expected))
    assert [int(w) for w in philox(*counter, *key)] == expected
    assert [int(w) for w in words(*counter, *key)] == expected  # the tests' own reference


def test_words_broadcast_and_wrap():
    c0, c1 = torch.arange(37), torch.tensor([[0], [5], [2 ** 32 - 1]])
    got = philox(c0, c1, 2 ** 31 + 3, 2 ** 32 - 1, 2 ** 32 - 5, 77)
    want = words(c0.numpy(), c1.numpy(), 2 ** 31 + 3, 2 ** 32 - 1, 2 ** 32 - 5, 77)
    for g, w in zip(got, want):
        assert g.dtype == torch.int64 and np.array_equal(g.numpy().astype(np.uint64), w)
    for g, w in zip(philox(c0 + 2 ** 32, c1 - 2 ** 32, -2 ** 31 + 3, -1, -5, 2 ** 32 + 77), got):
        assert torch.equal(g, w)  # all are taken mod 2^32


@pytest.mark.parametrize("rng", [
    (SEED, 0, 0, 0), (2 ** 64 - 3, 2 ** 32 - 3, 2 ** 32 - 1, 2 ** 32 - 1),
    (-2, torch.tensor([2, 2 ** 32 - 1, 0]), 7, 11)])
def test_normals_are_box_muller_of_their_words(rng):
    n = randn((3, 3, 21, 13), *rng)
    # Relative, too: the folded angles keep the digits of the smallest normals.
    torch.testing.assert_close(n.double(), normals(n.shape, *rng), rtol=1e-6, atol=0)


def test_normals_of_the_exact_words():
    """u and v not rounded to float32: u = (w0 + 1/2) / 2^32, angle 2 pi w1 / 2^32, all in
    float64."""
    n = randn((4, 4096), 5, 1, 2, 3).double().reshape(4, -1, 4)
    w = [v.astype(np.float64) for v in words(np.arange(1024), np.arange(1, 5)[:, None], 2, 3, 5, 0)]
    for i in (0, 2):
        u, angle = (torch.from_numpy((w[i] + 0.5) / 2 ** 32),
                    torch.from_numpy(2 * np.pi * w[i + 1] / 2 ** 32))
        inner = u < 0.999  # next to u = 1 the radius magnifies u's rounding of 2^-25
        r = (-2 * u.log()).sqrt()
        torch.testing.assert_close(n[..., i][inner], (r * angle.cos())[inner], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            n[..., i + 1][inner], (r * angle.sin())[inner], rtol=0, atol=1e-5)


def test_extreme_words():
    """u = 2^-33 and 1; angles at and next to every quarter turn."""
    edges = torch.tensor([k * 2 ** 30 + d for k in range(4)
                          for d in (-200, -1, 0, 1, 200)]) % 2 ** 32
    w0 = torch.tensor([0, 1, 2 ** 31, 2 ** 32 - 129, 2 ** 32 - 1]).repeat_interleave(len(edges))
    w1 = edges.repeat(5)
    r, cos, sin = noise._box_muller(w0, w1)
    assert math.isclose(float(r.max()), math.sqrt(66 * math.log(2)), rel_tol=1e-6)
    assert (r[w0 == 2 ** 32 - 1] == 0).all() and torch.isfinite(r).all()
    v = torch.where(w1 >= 2 ** 31, w1 - 2 ** 32, w1).float().double() / 2 ** 32
    torch.testing.assert_close(cos.double(), torch.cos(2 * np.pi * v), rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(sin.double(), torch.sin(2 * np.pi * v), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_the_float32_numbers_rounded_once(dtype):
    n = randn((2, 5, 9), SEED, dtype=dtype)
    assert n.dtype == dtype and torch.equal(n, randn((2, 5, 9), SEED).to(dtype))
    if dtype != torch.float64:
        assert int(ulps(n, normals(n.shape, SEED, 0, 0, 0).to(dtype)).max()) <= 1


def test_any_batch_split_gives_the_same_rows(monkeypatch):
    whole = randn((7, 3, 10, 5), SEED, 5, 2, 3)
    parts = [randn((k, 3, 10, 5), SEED, 5 + b, 2, 3) for b, k in ((0, 1), (1, 4), (5, 2))]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.tensor([3, 0, 6, 6])
    assert torch.equal(whole[order], randn((4, 3, 10, 5), SEED, 5 + order, 2, 3))
    # the flat index alone counts
    assert torch.equal(whole, randn((7, 150), SEED, 5, 2, 3).view_as(whole))
    odd = randn((7, 33), SEED, 5, 2, 3)
    assert torch.equal(whole.flatten(1)[:, :33], odd) and odd.is_contiguous()
    monkeypatch.setattr(noise, "_CHUNK", 16)  # rows longer than a pass of the twin
    assert torch.equal(whole, randn((7, 3, 10, 5), SEED, 5, 2, 3))


def test_numbers_may_be_tensors():
    whole = randn((3, 8), 9, 4, 5, 6)
    assert torch.equal(
        whole, randn((3, 8), torch.tensor(9), torch.arange(4, 7), torch.tensor(5), 6))
    assert torch.equal(whole, randn((3, 8), np.int64(9), np.int32(4), np.uint8(5), 6))
    assert torch.equal(randn((3, 8), -1), randn((3, 8), 2 ** 64 - 1))
    assert torch.equal(randn((3, 8), torch.tensor(-1)), randn((3, 8), 2 ** 64 - 1))


def moments_and_ks(x):
    n = x.numel()
    x = x.double().flatten()
    z = [x.mean() * n ** 0.5, (x.square().mean() - 1) * (n / 2) ** 0.5,
         x.pow(3).mean() * (n / 15) ** 0.5,
         (x.pow(4).mean() - 3) * (n / 96) ** 0.5]  # E x^6 = 15; Var x^4 = 105 - 9
    cdf = 0.5 * torch.special.erfc(-x.sort().values / 2 ** 0.5)
    i = torch.arange(n, dtype=torch.float64)
    ks = torch.maximum((cdf - i / n).max(), ((i + 1) / n - cdf).max()) * n ** 0.5
    return [float(v) for v in z], float(ks)


@pytest.mark.parametrize("shape", [(1 << 10, 1 << 10), (1, 1 << 20),
                                   pytest.param((100, 10 ** 5), marks=pytest.mark.slow)])
def test_moments_and_kolmogorov_smirnov(shape):
    x = randn(shape, SEED, step=17)
    z, ks = moments_and_ks(x)
    # Each bound fails one good generator in a thousand, or fewer; the seed is fixed.
    assert max(abs(v) for v in z) < 4 and ks < 1.95, (z, ks)
    for part in x.view(-1, 4).unbind(1):  # each of the four words by itself
        z, ks = moments_and_ks(part)
        assert max(abs(v) for v in z) < 4 and ks < 1.95, (z, ks)


def test_everything_in_key_and_counter_counts_and_is_independent():
    base = dict(seed=3, sample=10, step=20, stream=30)
    x = randn((64, 4096), **base).double()
    changed = [{name: base[name] + d} for name in ("seed", "step", "stream")
               for d in (-1, 1, 2 ** 16)]
    changed += [{"seed": 3 + 2 ** 32}, {"sample": 10 + 64}, {"sample": 2 ** 31},
                {"step": 30, "stream": 20}]
    others = [(change, randn((64, 4096), **base | change).double()) for change in changed]
    others += [(shift, x.roll(*shift)) for shift in ((1, 0), (1, 1), (2, 1), (3, 1), (4, 1))]
    bound = 5 / x.numel() ** 0.5
    for what, y in others:
        # of the numbers, and of their sizes
        for f in (lambda v: v, lambda v: (v.square() - 1) / 2 ** 0.5):
            assert abs(float((f(x) * f(y)).mean())) < bound, what


def test_zero_sizes():
    for shape in ((0, 3, 4), (3, 0), (0,)):
        assert randn(shape, 1).shape == shape
    assert randn((0, 3), 1, torch.empty(0, dtype=torch.int64),
                 dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("kwargs, word", [
    (dict(shape=()), "shape"), (dict(dtype=torch.int64), "dtype"), (dict(seed=2 ** 64), "seed"),
    (dict(seed=1.5), "seed"), (dict(seed=torch.zeros(1, dtype=torch.int64)), "seed"),
    (dict(step=-1), "step"), (dict(step=2 ** 32), "step"), (dict(step=torch.tensor(1.0)), "step"),
    (dict(stream="a"), "stream"), (dict(stream=2 ** 32), "stream"),
    (dict(sample=-1), "sample"), (dict(sample=2 ** 32 - 1), "sample"),
    (dict(sample=torch.zeros(3, dtype=torch.int64)), "sample"),
    (dict(sample=torch.zeros(2)), "sample"),
    (dict(sample=torch.zeros(2, dtype=torch.int64, device="meta")), "sample"),
    (dict(seed=torch.zeros((), dtype=torch.int64, device="meta")), "seed"),
])
def test_bad_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word) as error:
        randn(**dict(shape=(2, 3), seed=0) | kwargs)
    assert "\n" not in str(error.value)


def test_imports_without_triton():
    code = ("import sys; sys.modules['triton'] = None\n"
            "from kernels import noise, diffuse\n"
            "assert noise.triton is None and diffuse.triton is None\n"
            "print(float(noise.randn((1, 1), 7)[0, 0]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(randn((1, 1), 7)[0, 0])


@pytest.mark.program("noise")
def test_kernel_in_the_interpreter(program):
    assert program.endswith("ok\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gpu_draws_the_same(dtype):
    shape, sample = (5, 3, 37, 41), torch.tensor([4, 2 ** 32 - 1, 0, 9, 9])
    for rng in ((SEED, 3, 4, 5), (-9, sample, 2 ** 31 + 1, 2 ** 32 - 1)):
        on_gpu = [r.cuda() if isinstance(r, torch.Tensor) else r for r in rng]
        got, want = (randn(shape, *on_gpu, dtype=dtype, device="cuda"),
                     randn(shape, *rng, dtype=dtype))
        again = randn(shape, torch.tensor(rng[0]).cuda(), on_gpu[1], torch.tensor(rng[2]).cuda(),
                      rng[3], dtype=dtype, device="cuda")
        assert torch.equal(got, again)
        if dtype.itemsize == 2:
            assert int(ulps(got.cpu(), want).max()) <= 1
        else:
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
