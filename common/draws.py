"""Every random number that is not a normal (kernels/noise.py has those): a function, not a state.

A number depends on (seed, stream, step, sample) alone. All draws are made on the CPU for the whole
batch and sliced by rank: so several processes draw what one would, and a resumed run needs only
its step. This file knows no method and no network.
"""
import functools

import torch

from common.files import stop
from common.gpu import sent
from common.processes import rank, world

# Training and sampling never share a stream.
(ORDER, FLIP, TIME, NOISE, DROP, START, STEP, JUDGE, VISIT, POSTERIOR, CODES, WORDS,
 WALK) = range(13)

BELOW_1 = 1 - 2 ** -24  # the largest float32 below 1: what is drawn in [0, 1) stays there


def generator(seed, stream, step=0):
    """A CPU generator that depends on these three whole numbers alone."""
    import numpy as np
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


@functools.lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def batch_index(n, batch, seed, step):
    """Which of n pictures the whole batch of update `step` (1, 2, ...) holds: int64 (batch,).

    Every epoch visits each picture once.
    """
    place = torch.arange((step - 1) * batch, step * batch)
    parts = []
    for epoch in (place // n).unique().tolist():
        here = place[place // n == epoch] - epoch * n
        parts.append(_order(n, seed, epoch)[here])
    return torch.cat(parts)


def part(batch):
    """The slice of a whole batch that this process computes."""
    each = batch // world()
    return slice(rank() * each, (rank() + 1) * each)


def flips(c, step):
    """Which pictures of update `step`'s batch are mirrored, half of them: bool (c.batch,)."""
    return torch.rand(c.batch, generator=generator(c.seed, FLIP, step)) < 0.5


def spread(c, step, alike=1):
    """One u in [0, 1) for each sample of update `step`'s whole batch: float64 (c.batch,).

    One lies in each of c.batch equal parts, all shifted alike: a batch's mean varies less (Kingma
    2021, appendix I.1). Of as many consecutive samples as `alike` says, all have the same u.
    """
    many = c.batch // alike
    shift = torch.rand((), generator=generator(c.seed, TIME, step), dtype=torch.float64)
    u = (torch.arange(many) + shift) / many
    return u.clamp(max=BELOW_1).repeat_interleave(alike)


def strata(k, n, generator):
    """k u in [0, 1) for each of n samples, one in each of k equal parts: float64 (k, n)."""
    u = torch.rand((k, n), generator=generator)
    return ((torch.arange(k)[:, None] + u.double()) / k).clamp(max=BELOW_1)


def drop_labels(label, c, step, share):
    """This process's labels (b,), of which a share becomes c.labels, "no label".

    They are drawn for update `step` (Ho 2022, classifier-free guidance). A picture without a class,
    -1, has no label either.
    """
    u = torch.rand(c.batch, generator=generator(c.seed, DROP, step))[part(c.batch)]
    dropped = sent(u < share, label.device)
    return torch.where(dropped | (label < 0), c.labels, label)


def drop_words(tokens, c, step, share, most):
    """This process's captions (b, L), of which a share says nothing and the others say less.

    Of each caption a rate is drawn in [0, most], and each word is left out at that rate; those
    after it move up. So a model also learns what a few words mean. Drawn for update `step`.
    """
    draw = generator(c.seed, WORDS, step)
    whole, rate = torch.rand((2, c.batch, 1), generator=draw)
    word = torch.rand((c.batch, tokens.shape[1]), generator=draw)
    dropped = ((whole < share) | (word < most * rate))[part(c.batch)]
    dropped = sent(dropped, tokens.device)
    tokens = tokens.masked_fill(dropped, 0)
    order = (tokens == 0).int().argsort(dim=1, stable=True)  # what is left comes first
    return tokens.gather(1, order)


def sample_labels(c, n, label=""):
    """Labels (n,) on c.device: this class's, or with "" each in turn; None where none are learnt.

    label: a name of c.classes, or a number; a name wins.
    """
    if not c.labels:
        return None
    if label == "":
        return torch.arange(n, device=c.device) % c.labels
    label, names = str(label), [str(name) for name in c.classes]
    if label in names:
        number = names.index(label)
    elif label.isdecimal() and int(label) < c.labels:
        number = int(label)
    else:
        more = " ..." * (len(names) > 20)
        stop(f"--label {label}: this model has no such class, but {', '.join(names[:20])}{more}, "
             f"or their numbers 0 to {c.labels - 1}")
    return torch.full((n,), number, device=c.device)
