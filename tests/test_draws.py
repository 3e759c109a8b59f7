"""common/draws.py: every random number is a function of (seed, stream, step, sample)."""
from types import SimpleNamespace

import pytest
import torch

from common import draws
from common.draws import TIME


def test_every_epoch_visits_each_picture_once():
    # 200 = 4 epochs of 50, with batches across their ends
    seen = torch.cat([draws.batch_index(50, 8, seed=3, step=s) for s in range(1, 26)])
    for epoch in seen.view(4, 50):
        assert epoch.sort().values.tolist() == list(range(50))
    assert seen[:50].tolist() != seen[50:100].tolist()
    # a batch may hold more than an epoch
    assert draws.batch_index(5, 12, seed=0, step=1).shape == (12,)


def test_draws_depend_on_their_three_numbers_alone():
    def draw(*key):
        return torch.rand(4, generator=draws.generator(*key)).tolist()
    torch.manual_seed(0)
    first = draw(0, TIME, 7)
    torch.manual_seed(1)
    torch.rand(10)
    assert draw(0, TIME, 7) == first
    keys = ((0, 1, 7), (1, 0, 7), (0, 2, 7), (0, 1, 8), (2 ** 62, 1, 7), (7, 1, 0))
    assert len({tuple(draw(*key)) for key in keys}) == 6


def test_streams_are_distinct():
    names = "ORDER FLIP TIME NOISE DROP START STEP JUDGE".split()
    assert len({getattr(draws, name) for name in names}) == len(names)


def test_ranks_share_a_batch(monkeypatch):
    whole = list(range(12))
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts += whole[draws.part(12)]
    assert parts == whole


@pytest.mark.parametrize("shift", [0.0, 0.5, 1 - 2 ** -53])
def test_what_is_drawn_below_one_stays_there_in_float32(shift, monkeypatch):
    """(15 + u) / 16 of a u just below 1 rounds to 1 in float32: t would then be T + 1."""
    def rand(*size, generator=None, dtype=torch.float32):
        return torch.full(size[0] if size else (), shift, dtype=dtype)
    monkeypatch.setattr(torch, "rand", rand)
    c = SimpleNamespace(seed=0, batch=16)
    for u in (draws.spread(c, 1), draws.strata(16, 3, None).flatten()):
        for u in (u, u.float()):
            assert 0 <= u.min() and u.max() < 1
            for T in (4, 512, 700, 1000):
                assert (1 + (u * T).long()).max() <= T


def test_pictures_without_a_class_train_as_unlabelled():
    c = SimpleNamespace(batch=1000, seed=0, labels=3)
    dropped = draws.drop_labels(torch.arange(1000) % 4 - 1, c, 5, 0.1)
    assert (dropped[::4] == 3).all() and dropped.min() == 0
    assert 0.05 < (dropped[1::4] == 3).float().mean() < 0.15
    none = draws.drop_labels(torch.arange(1000) % 4 - 1, c, 5, 0.0)
    assert (none[::4] == 3).all() and (none[1::4] == 0).all()


def test_labels_of_samples_go_round_or_are_the_one_asked_for():
    c = SimpleNamespace(labels=3, device="cpu", classes=("cat", "2", "0"))
    assert draws.sample_labels(c, 5).tolist() == [0, 1, 2, 0, 1]
    # a name wins: 2 is the name of 1, and 0 that of 2
    for label, number in (("cat", 0), ("1", 1), (1, 1), ("2", 1), ("0", 2)):
        assert draws.sample_labels(c, 2, label).tolist() == [number, number]
    assert draws.sample_labels(SimpleNamespace(labels=0), 5) is None
    for wrong in ("3", "dog", "-1", "1.5"):
        with pytest.raises(ValueError, match=f"--label {wrong}: .* but cat, 2, 0, or their numb"):
            draws.sample_labels(c, 2, wrong)
