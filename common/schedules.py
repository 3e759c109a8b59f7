"""Noise schedules of the discrete-time methods, and the numbers that follow from them.

It knows time and tensors: no flags, no network and no data.

alpha_bar[t] is the signal variance after t of T steps (Ho 2020, section 2): alpha_bar[0] = 1 is
clean data, and
    x_t = sqrt(alpha_bar[t]) x0 + sqrt(1 - alpha_bar[t]) eps.
Everything is computed in float64, on the CPU, and indexed by t itself: no table here starts at 1.
"""
import math

import torch

SCHEDULES = ("linear", "linear-unscaled", "cosine", "ddgan")


def alpha_bar(schedule, T):
    """Signal variance at t = 0..T.

    schedule:
        "linear"           beta from 1e-4 to 0.02 at T = 1000 (Ho 2020); other T read the same
                           curve, log alpha_bar of T = 1000 interpolated at 1000 t / T, so that x_T
                           is noise however few the steps
        "linear-unscaled"  the raw betas, linspace(1e-4, 0.02, T): x_T keeps most of the picture
                           when T is small
        "cosine"           Nichol 2021, equation 17, s = 0.008, beta at most 0.999
        "ddgan"            Xiao 2021: the variance-preserving SDE, bmin 0.1, bmax 20, read at T + 1
                           times from 1e-3 to 1
    T: number of steps, at least 1. Returns float64 (T + 1,). ValueError for an unknown name or
    T < 1.
    """
    if T < 1:
        raise ValueError(f"T is {T}: it must be at least 1")
    t = torch.arange(T + 1, dtype=torch.float64)
    if schedule == "linear" and T != 1000:
        log = alpha_bar("linear", 1000).log()
        read = 1000 * t / T
        low = read.floor().long().clamp(max=999)
        return (log[low] + (read - low) * (log[low + 1] - log[low])).exp()
    if schedule in ("linear", "linear-unscaled"):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif schedule == "cosine":
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "ddgan":
        u = 1e-3 + t / T * (1 - 1e-3)
        log = -u ** 2 * (20 - 0.1) / 2 - u * 0.1
        beta = 1 - (log[1:] - log[:-1]).exp()
    else:
        raise ValueError(f"unknown schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


def posterior(alpha_bar_t, alpha_bar_s):
    """The Gaussian q(x_s | x_t, x0) for s < t, of any stride (Ho 2020, equations 6 and 7).

    alpha_bar_t, alpha_bar_s: float64 tensors of one shape, alpha_bar_t < alpha_bar_s <= 1.
    Returns c_x, c_0, beta, beta_tilde of that shape: the mean is c_x x_t + c_0 x0, the variance
    beta_tilde, and beta is the variance of q(x_t | x_s), the other choice for the reverse step.
    With s = 0: c_x = 0, c_0 = 1, beta_tilde = 0.
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    c_x = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    c_0 = torch.where(alpha_bar_s == 1, 1.0, alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t))
    return c_x, c_0, beta, beta * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def before(tau):
    """The step after each of tau (rising, int64 (K,)) on the way down: 0, tau_1, .., tau_{K-1}."""
    return torch.cat([tau.new_zeros(1), tau[:-1]])


def at(table, t, x):
    """A table's values at t, shaped beside x (B, ...).

    table: (n,), or (n, m), a row of m coefficients for each step; t: int64 (B,). Returns one tensor
    (B, 1, ...), or m of them.
    """
    shape = (-1, *[1] * (x.ndim - 1))
    if table.ndim == 1:
        return table[t].view(shape)
    return tuple(column.reshape(shape) for column in table[t].unbind(1))


def timesteps(T, K, spacing="linear"):
    """Exactly K distinct steps of 1..T, rising, the last one T (Song 2020, appendix D.2).

    spacing: "linear" tau_i = T i // K, or "quadratic" tau_i = max(i, round(T i^2 / K^2)), which is
    denser near clean data; i = 1..K.
    Returns int64 (K,). ValueError unless 1 <= K <= T.
    """
    if not 1 <= K <= T:
        raise ValueError(f"--steps {K}: this model has T = {T}, so choose from 1 to {T}")
    i = torch.arange(1, K + 1)
    if spacing == "linear":
        return T * i // K
    if spacing == "quadratic":
        # in whole numbers, halves rounded up: no float decides which step is visited
        return torch.maximum(i, (2 * T * i * i + K * K) // (2 * K * K))
    raise ValueError(f"unknown spacing {spacing!r}: choose linear or quadratic")


def prediction(kind, alpha_bar_t, alpha_bar_before):
    """How to read a network's output: x0 = p_x x_t + p_out out, for kind eps, x0, mean or v.

    alpha_bar_t, alpha_bar_before: float64, at t and at t - 1; only "mean", which is the mean of
    q(x_{t-1} | x_t, x0), needs the second.
    Returns p_x, p_out of their shape. v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans
    2022). ValueError for another kind.
    """
    signal, noise = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
    if kind == "eps":
        return 1 / signal, -noise / signal
    if kind == "x0":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if kind == "v":
        return signal, -noise
    if kind != "mean":
        raise ValueError(f"unknown prediction {kind!r}: choose eps, x0, mean or v")
    c_x, c_0, _, _ = posterior(alpha_bar_t, alpha_bar_before)
    return -c_x / c_0, 1 / c_0
