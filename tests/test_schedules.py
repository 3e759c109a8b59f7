"""Schedules against the papers' numbers, and what follows from them against Bayes."""
import math

import pytest
import torch
from torch.testing import assert_close

from common.schedules import SCHEDULES, alpha_bar, at, before, posterior, prediction, timesteps


def test_linear_is_ho_2020():
    ab = alpha_bar("linear", 1000)
    product = 1.0
    for t in range(1, 1001):
        product *= 1 - (1e-4 + (t - 1) * (0.02 - 1e-4) / 999)
        assert math.isclose(ab[t], product, rel_tol=1e-12)


@pytest.mark.parametrize("T", [20, 50, 100, 250, 500, 2000])
def test_linear_reads_one_curve(T):
    ab, full = alpha_bar("linear", T), alpha_bar("linear", 1000)
    assert_close(ab[-1], full[-1])
    if 1000 % T == 0:
        assert_close(ab, full[::1000 // T])
    else:
        assert_close(ab[::2], full)


def test_linear_unscaled_keeps_the_picture_when_T_is_small():
    for T, last in ((20, 0.82), (50, 0.60), (100, 0.36), (500, 0.0064)):
        assert abs(alpha_bar("linear-unscaled", T)[-1].item() - last) < 0.006 * last + 0.004


def test_cosine_is_nichol_2021():
    ab = alpha_bar("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert_close(ab[:990], torch.tensor(f, dtype=torch.float64)[:990] / f[0])
    assert (1 - ab[1:] / ab[:-1]).max() <= 0.999 + 1e-12


def test_ddgan_reference_values():
    for T, beta in ((2, [.921324, .999451]), (4, [.478255, .849206, .956418, .987404]),
                    (8, [.156445, .381493, .546501, .667488, .756197, .821240, .868930, .903898])):
        ab = alpha_bar("ddgan", T)
        beta = torch.tensor(beta, dtype=torch.float64)
        assert_close(1 - ab[1:] / ab[:-1], beta, atol=6e-7, rtol=0)
    c_x, c_0, _, variance = posterior(alpha_bar("ddgan", 4)[1:], alpha_bar("ddgan", 4)[:-1])
    for mine, known in ((variance, [0, .440819, .884202, .984061]),
                        (c_0, [1, .665778, .269191, .057822]),
                        (c_x, [0, .201576, .193001, .111852])):
        assert_close(mine, torch.tensor(known, dtype=torch.float64), atol=6e-7, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 7, 20, 1000, 2000])
def test_alpha_bar_falls_from_one(schedule, T):
    ab = alpha_bar(schedule, T)
    assert ab.shape == (T + 1,) and ab.dtype == torch.float64 and ab[0] == 1
    assert (ab[1:] < ab[:-1]).all() and ab[-1] > 0


def test_posterior_against_bayes():
    """Condition the joint Gaussian of (x_s, x_t) given x0 by the matrix formula."""
    for ab_t, ab_s in ((0.3, 0.7), (1e-4, 0.9), (0.5, 0.5001), (0.2, 1.0)):
        ab_t = torch.tensor(ab_t, dtype=torch.float64)
        ab_s = torch.tensor(ab_s, dtype=torch.float64)
        ratio = (ab_t / ab_s).sqrt()
        cross, var_t, var_s = ratio * (1 - ab_s), 1 - ab_t, 1 - ab_s
        c_x, c_0, beta, beta_tilde = posterior(ab_t, ab_s)
        assert_close(c_x, cross / var_t)
        assert_close(c_0, ab_s.sqrt() - cross / var_t * ab_t.sqrt())
        assert_close(beta_tilde, var_s - cross ** 2 / var_t)
        assert_close(beta, 1 - ab_t / ab_s)


def test_strided_posteriors_compose():
    """x_t -> x_s -> 0 leaves the same Gaussian as x_t -> 0 when x0 is known.

    The marginals of the walk are q(x_s | x0).
    """
    ab = alpha_bar("cosine", 50)
    tau = torch.cat([torch.zeros(1, dtype=torch.long), timesteps(50, 7)])
    mean, var = ab[50].sqrt(), 1 - ab[50]  # x_T given x0 = 1
    for t, s in zip(tau.flip(0)[:-1], tau.flip(0)[1:]):
        c_x, c_0, _, beta_tilde = posterior(ab[t], ab[s])
        mean, var = c_x * mean + c_0, c_x ** 2 * var + beta_tilde
        assert_close(mean, ab[s].sqrt())
        assert_close(var, 1 - ab[s], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_timesteps_are_exactly_K(spacing):
    for T in (*range(1, 120), 1000):
        for K in range(1, T + 1) if T < 120 else (1, 10, 50, 333, 999, 1000):
            tau = timesteps(T, K, spacing)
            assert len(tau) == K and tau[0] >= 1 and tau[-1] == T and (tau.diff() > 0).all()
    assert timesteps(7, 7, spacing).tolist() == [1, 2, 3, 4, 5, 6, 7]
    expected = list(range(100, 1001, 100))
    if spacing == "quadratic":
        expected = [max(i, round(1000 * i * i / 100 + 1e-9)) for i in range(1, 11)]
    assert timesteps(1000, 10, spacing).tolist() == expected


def test_prediction_inverts_each_kind():
    ab = alpha_bar("linear", 100)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(100, generator=g, dtype=torch.float64) for _ in range(2))
    a, s = ab[1:].sqrt(), (1 - ab[1:]).sqrt()
    x = a * x0 + s * eps
    c_x, c_0, _, _ = posterior(ab[1:], ab[:-1])
    for kind, out in dict(eps=eps, x0=x0, v=a * eps - s * x0, mean=c_x * x + c_0 * x0).items():
        p_x, p_out = prediction(kind, ab[1:], ab[:-1])
        assert_close(p_x * x + p_out * out, x0, atol=1e-9, rtol=1e-9)


def test_before_is_the_next_step_down():
    for T, K in ((1000, 50), (7, 7), (20, 3), (9, 1)):
        tau = timesteps(T, K)
        s = before(tau)
        assert s.tolist() == [0, *tau.tolist()[:-1]]
        assert s.dtype == torch.int64 and (s < tau).all()
    assert before(torch.arange(1, 101)).tolist() == list(range(100))


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4, 6)], ids=["points", "pictures"])
def test_at_is_plain_indexing_beside_x(shape):
    """A table's row for each sample, that multiplies every value of this sample and no other."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(shape, generator=g), torch.tensor([0, 7, 2, 7, 8])
    column, rows = torch.randn(9, generator=g), torch.randn(9, 4, generator=g)
    one, many = at(column, t, x), at(rows, t, x)
    assert len(many) == 4
    for b in range(5):
        assert_close((one * x)[b], column[t[b]] * x[b], rtol=0, atol=0)
        for k in range(4):
            assert_close((many[k] * x)[b], rows[t[b], k] * x[b], rtol=0, atol=0)
    for value in (one, *many):
        assert value.shape == (5, *[1] * (len(shape) - 1)) and value.dtype == column.dtype


def test_at_keeps_float64_and_slopes():
    table = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    first, second = at(table, torch.tensor([3, 1, 3]), torch.zeros(3, 2))
    (first + 10 * second).sum().backward()
    assert first.dtype == torch.float64
    assert table.grad.tolist() == [[0, 0], [1, 10], [0, 0], [2, 20]]


def test_wrong_input_says_what_to_do():
    ab = alpha_bar("cosine", 10)
    for call, words in ((lambda: timesteps(1000, 0), "from 1 to 1000"),
                        (lambda: timesteps(20, 21), "from 1 to 20"),
                        (lambda: alpha_bar("cosin", 10), "choose from"),
                        (lambda: timesteps(10, 5, "cubic"), "linear or quadratic"),
                        (lambda: prediction("score", ab[1:], ab[:-1]), "'score'.*eps, x0, mean"),
                        (lambda: prediction("", ab[1:], ab[:-1]), "eps, x0, mean or v")):
        with pytest.raises(ValueError, match=words):
            call()
