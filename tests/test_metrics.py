"""common/metrics.py against closed forms, naive loops, and sets whose quality is known."""
import math
import os

import pytest
import torch

from common import metrics

close = torch.testing.assert_close


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# --------------------------------------------------------------------------------- Frechet distance

def newton_root_trace(a, b):
    """tr (a b)^(1/2) by the Denman-Beavers iteration: inverses only, for regular covariances."""
    y, z = a @ b, torch.eye(len(a), dtype=torch.float64)
    for _ in range(60):
        y, z = (y + z.inverse()) / 2, (z + y.inverse()) / 2
    return y.trace()


def test_frechet_one_dimension():
    # (m1 - m2)^2 + (s1 - s2)^2
    got = metrics.frechet(*(torch.tensor(v, dtype=torch.float64)
                            for v in ([1.0], [[4.0]], [-2.0], [[0.25]])))
    assert got == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_frechet_diagonal_and_commuting():
    d = 20
    a, b = torch.rand(2, d, dtype=torch.float64, generator=generator(1)) + 0.1
    mu1, mu2 = normal(2, d, seed=2)
    want = float((mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert metrics.frechet(mu1, a.diag(), mu2, b.diag()) == pytest.approx(want, rel=1e-11)
    q = torch.linalg.qr(normal(d, d, seed=3)).Q       # one rotation of both changes nothing
    turned = metrics.frechet(q @ mu1, q @ a.diag() @ q.T, q @ mu2, q @ b.diag() @ q.T)
    assert turned == pytest.approx(want, rel=1e-11)


def test_frechet_general_against_newton():
    d = 12
    x, y = normal(d, 3 * d, seed=4), normal(d, 2 * d, seed=5)
    a, b = x @ x.T / d, y @ y.T / d                   # they do not commute
    assert (a @ b - b @ a).abs().max() > 0.1
    want = float(a.trace() + b.trace() - 2 * newton_root_trace(a, b))
    zero = torch.zeros(d, dtype=torch.float64)
    assert metrics.frechet(zero, a, zero, b) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet(zero, b, zero, a) == pytest.approx(want, rel=1e-9)


def test_frechet_singular_covariances():
    d, zero = 64, torch.zeros(64, dtype=torch.float64)
    a = normal(d, 3, seed=6)
    cov = a @ a.T                                     # rank 3 of 64
    # C against 4 C: tr(C) (1 - 2)^2; disjoint supports: nothing in common; a single point against
    # a Gaussian
    assert metrics.frechet(zero, cov, zero, 4 * cov) == pytest.approx(float(cov.trace()), rel=1e-12)
    assert metrics.frechet(zero, cov, zero, cov) == pytest.approx(0, abs=1e-10)
    e, f = torch.zeros(2, d, d, dtype=torch.float64)
    e[:5, :5], f[5:9, 5:9] = torch.eye(5), torch.eye(4)
    assert metrics.frechet(zero, e, zero, f) == pytest.approx(9, rel=1e-12)
    assert metrics.frechet(zero, 0 * cov, zero, cov) == pytest.approx(float(cov.trace()), rel=1e-12)
    assert metrics.frechet(zero, 0 * cov, zero, 0 * cov) == 0


def test_frechet_refuses():
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="must be"):
        metrics.frechet(zero, eye, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet(zero, eye * math.nan, zero, eye)


def test_moments_stream():
    x = normal(1003, 7, seed=7) * 1e-3 + 1e4          # the mean is ten million sigma away
    mu, cov = metrics.moments(x.split(100))
    close(mu, x.mean(0), rtol=1e-14, atol=0)
    close(cov, (x - 1e4).T.cov(), rtol=1e-8, atol=1e-14)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.moments([x[:1]])


# ------------------------------------------------------------- precision, recall, density, coverage

def naive(real, fake):
    """The definitions, one pair at a time."""
    def radius(points, i, k):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]
    real, fake = real.tolist(), fake.tolist()
    real3, real5 = ([radius(real, i, k) for i in range(len(real))] for k in (3, 5))
    fake3 = [radius(fake, i, 3) for i in range(len(fake))]
    d = [[math.dist(r, f) for f in fake] for r in real]
    n, m = range(len(real)), range(len(fake))
    return {"precision": sum(any(d[i][j] <= real3[i] for i in n) for j in m) / len(m),
            "recall": sum(any(d[i][j] <= fake3[j] for j in m) for i in n) / len(n),
            "density": sum(d[i][j] < real5[i] for i in n for j in m) / 5 / len(m),
            "coverage": sum(min(d[i]) < real5[i] for i in n) / len(n)}


@pytest.mark.parametrize("n, m", [(60, 60), (47, 80), (90, 33)])
def test_neighbours_against_loops(n, m, monkeypatch):
    blocks = metrics._squared_distances
    monkeypatch.setattr(metrics, "_squared_distances", lambda a, b: blocks(a, b, rows=17))
    real, fake = normal(n, 4, seed=8), 0.8 * normal(m, 4, seed=9) + 0.5
    got = metrics.neighbours(real + 100, fake + 100)  # far from the origin too
    want = naive(real, fake)
    assert 0.1 < want["precision"] < 1 and 0.1 < want["recall"] < 1  # a case that tells them apart
    assert got == pytest.approx(want, abs=1e-12)


def test_neighbours_constructed():
    real = normal(400, 3, seed=10)
    same = metrics.neighbours(real, real.clone())
    assert same == {"precision": 1, "recall": 1, "density": pytest.approx(1), "coverage": 1}
    far = metrics.neighbours(real, real + 1000)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # two modes, one never drawn: every sample is good, half the data is missed
    real[:200, 0] += 100
    other = normal(400, 3, seed=11)
    other[:, 0] += 100
    one = metrics.neighbours(real, other)
    assert one["precision"] > 0.9 and one["recall"] <= 0.5 and one["coverage"] <= 0.5
    # one picture over and over: nothing recalled though it is a real one
    point = metrics.neighbours(real, real[:1].expand(400, -1))
    assert point["precision"] == 1 and point["recall"] <= 1 / 400 and point["coverage"] < 0.05
    with pytest.raises(ValueError, match="too few"):
        metrics.neighbours(real, real[:5])


# ---------------------------------------------------------------------------- points, modes, scores

def test_sliced_wasserstein_in_one_dimension():
    x, y = normal(500, 1, seed=12), 2 * normal(500, 1, seed=13)
    want = float((x.sort(0).values - y.sort(0).values).abs().mean())
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(want, rel=1e-12)
    # unequal numbers: 3 points at 0 and 1 at 4 against 1 at 0 and 1 at 4: a quarter moves by 4
    a, b = torch.tensor([[0.0], [0.0], [0.0], [4.0]]), torch.tensor([[4.0], [0.0]])
    assert metrics.sliced_wasserstein(a, b) == pytest.approx(1, rel=1e-12)
    assert metrics.sliced_wasserstein(b, a) == pytest.approx(1, rel=1e-12)


def test_sliced_wasserstein_of_a_shift():
    x = normal(300, 2, seed=14)
    assert metrics.sliced_wasserstein(x, x) == 0
    # E |<u, (3, 4)>| over the circle is 5 * 2/pi; 256 directions estimate it with sigma
    # 5 * 0.308 / 16
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    got = metrics.sliced_wasserstein(x, x + shift)
    assert got == pytest.approx(10 / math.pi, abs=3 * 5 * 0.308 / 16)
    assert metrics.sliced_wasserstein(x, x + 2 * shift) == pytest.approx(2 * got, rel=1e-12)
    assert metrics.sliced_wasserstein(x, torch.cat([x, x])) == pytest.approx(0, abs=1e-12)


def test_grid_modes():
    side = torch.arange(-2.0, 3.0)
    centres, sigma = torch.cartesian_prod(side, side), 0.1
    index = torch.arange(10_000) % 25
    points = centres[index] + sigma * normal(10_000, 2, seed=15)
    got = metrics.grid_modes(points, centres, sigma)
    assert got["modes"] == got["modes_of"] == 25
    assert got["kl"] == pytest.approx(0, abs=1e-12)
    # P(|x| <= 3 sigma) = 1 - exp(-9/2) in two dimensions, over 10,000 points: sigma 0.001
    assert got["within"] == pytest.approx(1 - math.exp(-4.5), abs=0.004)
    # the shipped grid, from the shipped data
    drawn = metrics.data.load("gaussians", split="test")
    shipped = metrics.grid_modes(drawn.points, metrics.data.GAUSSIANS_MEANS,
                                 metrics.data.GAUSSIANS_SIGMA)
    assert (shipped["modes"] == 25
            and shipped["within"] == pytest.approx(1 - math.exp(-4.5), abs=0.01))
    # E(|x|^2 | |x| <= 3 sigma) / 2 = 1 - 4.5 / (exp(4.5) - 1), of 10,000 points: sigma 0.007
    assert got["spread"] == pytest.approx((1 - 4.5 / math.expm1(4.5)) ** 0.5, abs=0.02)
    # off their centres, which is not spread
    narrow = centres[index] + 0.03 + 0.4 * sigma * normal(10_000, 2, seed=16)
    assert metrics.grid_modes(narrow, centres, sigma)["spread"] == pytest.approx(0.4, abs=0.01)
    # 5 of 25 modes in equal parts: KL = log 5; far points are assigned, but count for no mode
    few = centres[torch.arange(1000) % 5]
    assert metrics.grid_modes(few, centres, sigma) == {
        "modes": 5, "modes_of": 25, "within": 1, "spread": 0,
        "kl": pytest.approx(math.log(5), rel=1e-6)}
    off = metrics.grid_modes(few + 0.31, centres, sigma)
    assert off["modes"] == off["within"] == off["spread"] == 0
    # 20 of 10,000 make a mode, 19 do not; so do 2 of 1,000, and 1 does not
    for n, enough in ((10_000, 20), (1000, 2)):
        for k, modes in ((enough, 2), (enough - 1, 1)):
            assert metrics.grid_modes(
                centres[[0] * (n - k) + [7] * k], centres, sigma)["modes"] == modes


def test_inception_score_closed_forms():
    assert metrics.inception_score(torch.full((100, 8), 1 / 8)) == pytest.approx(1, rel=1e-9)
    assert metrics.inception_score(torch.eye(8).repeat(100, 1)) == pytest.approx(8, rel=1e-9)
    # always one class
    assert metrics.inception_score(torch.eye(8)[[3] * 50]) == pytest.approx(1, rel=1e-9)
    # two blocks of 5,000: eight classes in one, two in the other
    two = torch.cat([torch.eye(8).repeat(625, 1), torch.eye(8)[:2].repeat(2500, 1)])
    assert metrics.inception_score(two) == pytest.approx((8 + 2) / 2, rel=1e-9)


def test_peak_memory_is_in_mib():
    before = metrics.peak_memory()
    held = torch.ones(64 * 2**20)                     # 256 MiB
    assert 20 < before < 100_000 and held[0] == 1
    assert metrics.peak_memory() - before < 400 and metrics.peak_memory() >= 256


# ------------------------------------------------------------------ pictures whose quality is known

SIDE, NAMES = 12, ["dot", "flat", "slope", "upright"]


class Drawn:
    """A data set, like those of common/data.py, of dots, lying bars, slopes (crosses) and standing
    bars."""
    def __init__(self, n, seed, channels=1, keep=None, labelled=True):
        g = generator(seed)
        y = torch.randint(4, (n,), generator=g)
        place, tone = torch.rand(n, 2, generator=g), torch.rand(n, 1, 1, generator=g)
        row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        at = 2 + (SIDE - 5) * place[:, :, None, None]
        low, wide = (row - at[:, 0]).abs(), (column - at[:, 1]).abs()
        kinds = torch.stack([torch.maximum(low, wide), low, (low - wide).abs(), wide], 1)
        x = (1.6 - kinds[torch.arange(n), y]).clamp(0, 1) * (0.6 + 0.4 * tone)
        x = x + 0.2 * row / SIDE + 0.03 * torch.randn(n, SIDE, SIDE, generator=g)   # brighter below
        keep = list(range(4)) if keep is None else [NAMES.index(c) for c in keep]
        kept = (y[:, None] == torch.tensor(keep)).any(1)
        x, y = (255 * x.clamp(0, 1)).to(torch.uint8)[kept], y[kept]
        self.images = x[:, None].expand(-1, channels, -1, -1).contiguous()
        self.labels = (torch.searchsorted(torch.tensor(keep), y) if labelled
                       else torch.full_like(y, -1))
        self.classes = [NAMES[k] for k in keep] if labelled else []
        self.hashes = None
        self.name, self.points, self.shape = "drawn", None, (channels, SIDE, SIDE)

    def __len__(self):
        return len(self.labels)


@pytest.fixture
def drawn(monkeypatch):
    """evaluate() on drawings; `options` changes them, and a short training is enough."""
    options = {}

    def load(name, root="data", size=None, classes=None, split="train", seed=0):
        return Drawn(*{"train": (2000, 1), "test": (700, 2)}[split], keep=classes, **options)
    monkeypatch.setattr(metrics.data, "load", load)
    monkeypatch.setattr(metrics, "UPDATES", {1: 120, 3: 120})
    return options


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    # one cached classifier for all tests of the drawings
    return str(tmp_path_factory.mktemp("data"))


def test_better_pictures_have_better_figures(drawn, root, capsys):
    real = Drawn(500, 3).images
    good = metrics.evaluate(real, "drawn", root)
    assert "of held-out pictures right" in capsys.readouterr().err
    assert list(good) == [
        "samples", "accuracy", "fcd", "fcd_floor", "floor_n", "precision", "recall", "density",
        "coverage", "class_kl", "class_least", "class_most"]
    assert all(type(v) is float and math.isfinite(v) for v in good.values())
    assert good["samples"] == good["floor_n"] == 500 and good["accuracy"] > 0.95
    net, train = metrics.classifier("drawn", root)[0], Drawn(2000, 1)
    features = metrics.look(net, train.images, torch.arange(2000))[0]
    assert float(features.var(0).sum()) == pytest.approx(100, rel=1e-3)  # this sets the scale
    # few samples: the floor is the mean over five draws of as many held-out pictures
    reference = metrics.moments([features])
    held_out = metrics.look(net, Drawn(700, 2).images, metrics.choice(700, 500))[0].split(100)
    floors = [metrics.frechet(*metrics.moments([x]), *reference) for x in held_out]
    few = metrics.evaluate(real[:100], "drawn", root)
    assert few["fcd_floor"] == pytest.approx(sum(floors) / 5, rel=1e-4) and few["floor_n"] == 100
    assert few["fcd_floor"] > good["fcd_floor"]
    # new real pictures are as near as the held-out ones
    assert 0 < good["fcd_floor"] < 3 and good["fcd"] < 3 * good["fcd_floor"] + 0.5
    assert (min(good[k] for k in ("precision", "recall", "coverage")) > 0.8
            and 0.8 < good["density"] < 1.2)
    assert good["class_kl"] < 0.02 and 0.7 < good["class_least"] <= 1 <= good["class_most"] < 1.3

    noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=generator(4))
    noise = metrics.evaluate(noise, "drawn", root)
    assert capsys.readouterr().err == ""              # the classifier was kept
    assert (noise["fcd"] > 30 * good["fcd"] and noise["precision"] < 0.05
            and noise["coverage"] < 0.05)
    assert noise["fcd_floor"] == good["fcd_floor"] and noise["accuracy"] == good["accuracy"]

    blurred = torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).to(torch.uint8)
    assert 5 * good["fcd"] < metrics.evaluate(blurred, "drawn", root)["fcd"] < noise["fcd"]

    everything = Drawn(2500, 6)
    dots = metrics.evaluate(everything.images[everything.labels == 0][:500], "drawn", root)
    assert dots["fcd"] > 10 * good["fcd"] and dots["precision"] > 0.7 and dots["recall"] < 0.5
    assert (dots["class_kl"] > 0.9 * math.log(4) and dots["class_least"] < 0.1
            and dots["class_most"] > 3)


def test_reference_is_kept(drawn, tmp_path, monkeypatch):
    """The second time only the samples are looked at; other pictures or another classifier: all."""
    root, real = str(tmp_path), Drawn(100, 3).images
    looked, look = [], metrics.look
    monkeypatch.setattr(metrics, "look", lambda net, images, index, device="cpu":
                        looked.append(len(index)) or look(net, images, index, device))
    first = metrics.evaluate(real, "drawn", root)
    assert looked == [2000, 100, 2000, 500]  # the classifier's scale; samples; both references
    looked.clear()
    assert metrics.evaluate(real, "drawn", root) == first and looked == [100]
    looked.clear()
    metrics.evaluate(real, "drawn", root, classes=["dot", "upright"])
    assert looked[0] == 100 and len(looked) == 3
    looked.clear()
    kept = next(tmp_path.glob("classifier-*.pt"))
    state = torch.load(kept)
    state["state"]["scale"] *= 2  # a classifier that was made again, differently
    torch.save(state, kept)
    again = metrics.evaluate(real, "drawn", root)
    assert looked == [100, 2000, 500]
    assert again["fcd"] == pytest.approx(4 * first["fcd"], rel=1e-5)


def test_kept_classes_share_the_classifier(drawn, root, monkeypatch, capsys):
    metrics.classifier("drawn", root)
    capsys.readouterr()
    some = Drawn(900, 7, keep=["dot", "upright"])
    result = metrics.evaluate(some.images, "drawn", root, classes=["dot", "upright"])
    assert capsys.readouterr().err == ""              # that of all four classes served
    assert result["fcd"] < 1.5 * result["fcd_floor"] + 0.5 and result["class_kl"] < 0.02
    # fewer are held out than were drawn: the floor says so, and the training pictures stand in for
    # neighbours
    assert result["samples"] == len(some) > result["floor_n"] == len(
        Drawn(700, 2, keep=["dot", "upright"]))
    seen, neighbours = [], metrics.neighbours
    monkeypatch.setattr(metrics, "neighbours", lambda *sets: seen.append(sets) or neighbours(*sets))
    for n in (len(some), 250):
        metrics.evaluate(some.images[:n], "drawn", root, classes=["dot", "upright"])
        assert [len(x) for x in seen.pop()] == [n, n]
    one = metrics.evaluate(some.images[some.labels == 0][:100], "drawn", root, classes=["dot"])
    assert "class_kl" not in one and one["fcd"] < 5
    wrong = metrics.evaluate(some.images[some.labels == 1][:100], "drawn", root, classes=["dot"])
    assert wrong["fcd"] > 10 * one["fcd"]


def test_class_shares():
    """Labelled training pictures: two thirds and one third; eight samples: four in each kept
    class."""
    train = Drawn(2, 1)
    train.labels, train.classes = torch.tensor([0, 0, 1, -1, -1]), ["upright", "dot"]
    logits = torch.eye(4)[torch.tensor([3, 0] * 4)]
    logits[:, 1] = 9                                  # a class that was not kept is none to choose
    assert metrics._class_shares(logits, train, NAMES) == pytest.approx(
        {"class_kl": 0.5 * math.log(0.75) + 0.5 * math.log(1.5), "class_least": 0.75,
         "class_most": 1.5})


def test_without_labels_it_learns_rotations(drawn, root, capsys):
    drawn["labelled"] = False
    result = metrics.evaluate(Drawn(300, 3).images, "drawn", root)
    assert "rotations right" in capsys.readouterr().err
    assert result["accuracy"] > 0.9
    assert "class_kl" not in result and result["fcd"] < 3 * result["fcd_floor"] + 0.5
    noise = torch.randint(256, (300, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator(4))
    assert metrics.evaluate(noise, "drawn", root)["fcd"] > 20 * result["fcd"]


def test_stacked_modes_are_three_classes(drawn, root, monkeypatch):
    net, _, names = metrics.classifier("drawn", root)
    picture = [Drawn(400, 8).images[Drawn(400, 8).labels == k][:1] for k in range(4)]
    assert [int(metrics.look(net, p, torch.arange(1))[1].argmax()) for p in picture] == [0, 1, 2, 3]
    triples = [(a, b, c) for a in range(4) for b in range(4) for c in range(3)]         # 48 modes
    stacked = torch.cat([torch.cat([picture[k] for k in t], 1) for t in triples * 2])
    features, logits = metrics.look(net, stacked, torch.arange(len(stacked)))
    assert features.shape == (96, 480) and logits.shape == (96, 3, 4)
    assert logits.argmax(2).tolist() == [list(t) for t in triples * 2]

    def load(name, root="data", size=None, classes=None, split="train", seed=0):
        return Drawn(300, 9, channels=1 if name == "digits" else 3)
    monkeypatch.setattr(metrics.data, "load", load)
    monkeypatch.setattr(metrics, "classifier",
                        lambda name, *_: (net, 0.5, names) * (name == "digits"))
    result = metrics.evaluate(stacked, "stacked", root)
    assert result["modes"] == 48 and result["modes_of"] == 1000 and "class_kl" not in result
    assert result["kl"] == pytest.approx(math.log(1000 / 48), rel=1e-6)


def test_classifier_is_cached_and_deterministic(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "UPDATES", {1: 12})
    torch.manual_seed(5)
    a = metrics.classifier("drawn", str(tmp_path / "new" / "root"))
    after = torch.rand(3)
    torch.manual_seed(5)
    close(after, torch.rand(3), rtol=0, atol=0)       # the global generator was not touched
    b = metrics.classifier("drawn", str(tmp_path))    # another folder, another global state
    for x, y in zip(a[0].state_dict().values(), b[0].state_dict().values()):
        close(x, y, rtol=0, atol=0)
    (path,) = tmp_path.glob("*.pt")
    assert path.name.startswith("classifier-drawn-12-") and a[1] == b[1] and b[2] == NAMES
    capsys.readouterr()
    stamp = path.stat().st_mtime_ns
    metrics.classifier("drawn", str(tmp_path))
    assert path.stat().st_mtime_ns == stamp and capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:1000])        # cut: told, made again, whole
    metrics.classifier("drawn", str(tmp_path))
    assert ("damaged" in capsys.readouterr().err
            and metrics.classifier("drawn", str(tmp_path))[1] == b[1])
    monkeypatch.setattr(metrics, "UPDATES", {1: 3})   # another recipe: the same file, made again
    capsys.readouterr()
    metrics.classifier("drawn", str(tmp_path))
    assert "after 3 updates" in capsys.readouterr().err and len(list(tmp_path.glob("*.pt"))) == 1

    load = metrics.data.load

    def changed(*args):
        kept = load(*args)
        kept.labels = (kept.labels + 1) % 4
        return kept
    monkeypatch.setattr(metrics.data, "load", changed)
    metrics.classifier("drawn", str(tmp_path))        # other data: another file
    # two files and the first folder: nothing half-written
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_in_a_cached_file_runs(drawn, tmp_path, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    monkeypatch.setattr(metrics, "UPDATES", {1: 2})
    metrics.classifier("drawn", str(tmp_path))
    (path,) = tmp_path.glob("*.pt")
    torch.save({"key": Evil(), "state": {}}, path)
    capsys.readouterr()
    metrics.classifier("drawn", str(tmp_path))
    assert not (tmp_path / "ran").exists() and "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "channels, side", [(1, 8), (3, 16), (1, 28), (3, 33), (3, 64), (1, 256), (1, 4)])
def test_classifier_takes_every_size(channels, side):
    features, logits = metrics.Classifier(channels, side, 7)(torch.zeros(2, channels, side, side))
    assert features.shape == (2, 160) and logits.shape == (2, 7)


def test_evaluate_refuses(drawn, root):
    good = Drawn(20, 3).images
    for bad, text in [(good.float(), "float32"), (good.numpy(), "uint8"), (None, "None"),
                      (good[:5], "few"), (good[0], r"\(1, 12, 12\)"),
                      (good[:, :, :8], r"\(20, 1, 8, 12\)"),
                      (good.expand(-1, 3, -1, -1), r"\(20, 3, 12, 12\)")]:
        with pytest.raises(ValueError, match=text) as error:
            metrics.evaluate(bad, "drawn", root)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- points

def test_points(monkeypatch, tmp_path):
    class Points:
        images, labels, classes, shape, name = None, torch.full((900,), -1), [], (2,), "swirl"

        def __init__(self, seed):
            self.points = normal(900, 2, seed=seed).float()

        def __len__(self):
            return 900
    monkeypatch.setattr(
        metrics.data, "load",
        lambda name, root, size, classes, split, seed: Points({"train": 1, "test": 2}[split]))
    fine = metrics.evaluate(Points(3).points, "swirl", str(tmp_path))
    assert list(fine) == [
        "samples", "wasserstein", "wasserstein_floor", "floor_n", "precision", "recall", "density",
        "coverage", "on_curve", "std", "on_curve_of_data", "std_of_data"]
    assert fine["std"] == pytest.approx(1, abs=0.1) and fine["on_curve"] < 0.5
    assert fine["wasserstein"] < 0.15 and fine["wasserstein_floor"] < 0.15
    moved = metrics.evaluate(Points(3).points + 1, "swirl", str(tmp_path))
    assert moved["wasserstein"] == pytest.approx(2**0.5 * 2 / math.pi, abs=0.2)  # E |<u, (1, 1)>|
    assert "sliced Wasserstein" in metrics.report(moved) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="for pictures"):
        metrics.evaluate(Points(3).points, "swirl", str(tmp_path), inception="any.pt")
    broken = Points(3).points
    broken[7, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        metrics.evaluate(broken, "swirl", str(tmp_path))


def test_the_share_on_the_curve():
    """Of points noised by sigma about a line, erf(3 / sqrt(2)) lie within 3 sigma; at 1.5 sigma
    twice as wide."""
    line = torch.stack([torch.linspace(-1, 1, 2000), torch.zeros(2000)], 1)
    points = torch.stack([normal(20_000, seed=1).clamp(-3, 3) / 4,
                          0.01 * normal(20_000, seed=2)], 1)
    for wider, want in ((1, 0.9973), (2, 0.8664)):
        told = metrics.on_curve(points * torch.tensor([1, wider]), line, 0.01)
        assert told["on_curve"] == pytest.approx(want, abs=4 * (want * (1 - want) / 20_000) ** 0.5)
    swirl = metrics.data.load("swirl", split="test").points
    curve = metrics.data.swirl_curve(torch.linspace(0, 1, 2000))
    told = metrics.on_curve(swirl, curve, metrics.data.SWIRL_SIGMA)
    assert told["on_curve"] > 0.99 and told["std"] == pytest.approx(0.209 ** 0.5, abs=0.02)


def test_report():
    text = metrics.report({
        "samples": 26000.0, "accuracy": 0.9931, "fcd": 12.345, "fcd_floor": 1.234,
        "floor_n": 600.0, "precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.7,
        "class_kl": 0.01, "class_least": 0.5, "class_most": 2.0, "fid": 30.0, "is": 5.0,
        "ms per sample": 12.5})
    lines = text.splitlines()
    (fcd,) = [line for line in lines if line.startswith("FCD")]
    assert "12.3" in fcd and "1.234" in fcd and "600" in fcd
    assert lines[0].split() == ["samples", "26000"]
    assert "99.31%" in text and "0.50 to 2.00" in text and len(lines) == 12 and "12.5" in lines[-1]
    column = {len(line) - len(line[len(line.split("  ")[0]):].lstrip()) for line in lines}
    assert len(column) == 1                           # aligned


# --------------------------------------------------------------------------------------- FID and IS

class Usual(torch.nn.Module):
    """Called like the usual export. Features: means of four quarters, then zeros; classes: the
    brightest."""
    def __init__(self):
        super().__init__()
        self.used = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        quarters = torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1), 2).flatten(1) / 255
        if return_features:
            return torch.nn.functional.pad(quarters, [0, 2044])
        bias = 0 if no_output_bias else 1000
        return (1000 * quarters + bias * torch.tensor([1.0, 0.0, 0.0, 0.0])).softmax(1)


class Plain(torch.nn.Module):
    """The features alone, or with logits."""
    def __init__(self, width: int, logits: bool):
        super().__init__()
        self.width, self.logits = width, logits

    def forward(self, x: torch.Tensor):
        quarters = torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1), 2).flatten(1) / 255
        features = torch.nn.functional.pad(quarters, [0, self.width - 4])
        return features, (1000 * quarters if self.logits else quarters[:, :0])


class Bare(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return torch.nn.functional.pad(x.float().mean([1, 2, 3])[:, None], [0, 2047])


def saved(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


def quarter_pictures(n=8):
    """One quarter bright, in turn: four sure classes in equal numbers."""
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i in range(n):
        row, column = divmod(i % 4, 2)
        x[i, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4] = 255
    return x


@pytest.mark.parametrize("module, scored", [(Usual(), True), (Plain(2048, True), True),
                                            (Bare(), False)])
def test_inception_calls(module, scored, tmp_path):
    call = metrics.load_inception(saved(module, tmp_path / "net.pt"))
    features, probabilities = call(quarter_pictures())
    assert features.shape == (8, 2048) and features.dtype == torch.float64
    assert (probabilities is not None) == scored
    if scored:
        close(probabilities, torch.eye(4, dtype=torch.float64).repeat(2, 1), rtol=0, atol=1e-9)
        assert metrics.inception_score(probabilities) == pytest.approx(4, rel=1e-6)


def test_inception_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        metrics.load_inception(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"a": 1}, tmp_path / "tensors.pt")
    for name in ("text.pt", "tensors.pt"):
        with pytest.raises(ValueError, match="no TorchScript"):
            metrics.load_inception(str(tmp_path / name))
    with pytest.raises(ValueError, match="2048") as error:
        metrics.load_inception(saved(Plain(100, True), tmp_path / "narrow.pt"))(quarter_pictures())
    assert "\n" not in str(error.value)


def test_fid_and_is(drawn, root, tmp_path, monkeypatch):
    path = saved(Usual(), tmp_path / "net.pt")
    train, call = Drawn(2000, 1), metrics.load_inception(path)
    frechet = metrics.frechet

    def quick(*gaussians):                            # the features are zero from the fifth on
        wide = len(gaussians[0]) == 2048
        return frechet(*[x[(slice(4),) * x.ndim] for x in gaussians] if wide else gaussians)
    monkeypatch.setattr(metrics, "frechet", quick)
    result = metrics._fid_and_is(call, train.images, train, path, str(tmp_path))
    assert result["fid"] == pytest.approx(0, abs=1e-9) and 1 <= result["is"] <= 4
    (kept,) = tmp_path.glob("inception-*.pt")
    stamp = kept.stat().st_mtime_ns
    dark = torch.zeros(50, 1, SIDE, SIDE, dtype=torch.uint8)
    dark = metrics._fid_and_is(call, dark, train, path, str(tmp_path))
    assert dark["is"] == pytest.approx(1, rel=1e-9) and kept.stat().st_mtime_ns == stamp
    whole = metrics.evaluate(Drawn(50, 3).images, "drawn", root, inception=path)
    assert 0 < whole["fid"] < 0.1 and 1 < whole["is"] <= 4
    # a single point: its distance to the mean, and all the reference's variance
    quarters = torch.nn.functional.adaptive_avg_pool2d(
        train.images[:, 0].double(), 2).flatten(1) / 255
    want = quarters.mean(0).square().sum() + quarters.var(0).sum()
    assert dark["fid"] == pytest.approx(float(want), rel=1e-5)


# ----------------------------------------------------------------------------------------- for real

@pytest.mark.slow
def test_digits(tmp_path):
    """The classifier of the drawn digits, as it is shipped: at least 99 % right, and a low
    floor."""
    real = metrics.data.load("digits", str(tmp_path), split="test")
    result = metrics.evaluate(real.images[::2], "digits", str(tmp_path))
    print(metrics.report(result))
    assert result["accuracy"] > 0.99 and result["fcd_floor"] < 1 and result["fcd"] < 1
    assert result["class_least"] > 0.6 and result["class_most"] < 1.4
