"""How good and how diverse samples are: the same numbers for every method.

    result = evaluate(samples, "digits")        # uint8 (N, C, H, W), or float32 points (N, 2)
    print(report(result))

FCD is the Frechet distance in the features of a small classifier that is trained here, once, on all
classes of the same data, and kept under the data root. It is no FID, and means nothing across data
sets or classifiers: read it against its floor, which as many real held-out pictures get against the
same reference.

Frechet distance and FID: Heusel 2017 (1706.08500). IS: Salimans 2016 (1606.03498). Precision,
recall: Kynkaanniemi 2019 (1904.06991). Density, coverage: Naeem 2020 (2002.09797). Modes: Metz 2016
(1611.02163). Sliced Wasserstein: Bonneel 2015. Rotations: Gidaris 2018 (1803.07728). All statistics
are float64.

It knows no method, only samples.
"""
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import data, flags, words
from common.files import inputs, save_tensors, unpickled, written
from common.pictures import to_uint8
from common.progress import progress

REFERENCE = 20_000  # training pictures or points that samples are compared with, at most
NEIGHBOURS = 10_000  # samples that precision, recall, density and coverage look at, at most
UPDATES = {1: 600, 3: 1500}  # of the classifier at most, by the pictures' channels
# In colour it ends before: each CHECK updates held-out pictures are looked at, and where PATIENCE
# looks in turn were no better than one before, its rate falls to zero over COOL more.
CHECK, PATIENCE, COOL = 100, 3, 200
KEEP_EVERY = 20.0  # seconds between two states of it that are kept
# part of the cache's key: to be changed with whatever changes the classifier
RECIPE = "classifier 1"


# ---------------------------------------------------------------------- distances between two sets
def moments(features):
    """Mean (D,) and covariance (D, D), float64, of blocks (n_i, D).

    It takes one pass, with one block in memory.
    """
    n = 0
    first = second = 0.0  # sums of x - shift and of its outer products
    shift = None  # near the mean, so that nothing cancels below
    for block in features:
        block = block.double()
        if shift is None:
            shift = block.mean(0)
        block = block - shift
        n += len(block)
        first = first + block.sum(0)
        second = second + block.T @ block
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {n}: draw more")
    mean = first / n
    return shift + mean, (second - n * torch.outer(mean, mean)) / (n - 1)


def frechet(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two Gaussians.

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), of mu (D,) and cov (D, D) symmetric,
    positive semi-definite, of any rank. With cov = A A^T the trace of the root is the sum of the
    singular values of A1^T A2: as accurate for singular covariances as for regular ones.
    """
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mu1, cov1, mu2, cov2))
        raise ValueError(f"means and covariances must be (D,), (D, D), (D,), (D, D), not {shapes}")
    roots = []
    for cov in (cov1.double(), cov2.double()):
        if not torch.isfinite(cov).all():
            raise ValueError("a covariance is not finite: there is NaN or infinity among the "
                             "features")
        w, v = torch.linalg.eigh((cov + cov.T) / 2)
        keep = w > w.max() * len(w) * torch.finfo(w.dtype).eps  # below is rounding, no variance
        roots.append(v[:, keep] * w[keep].sqrt())  # A: (D, rank)
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()  # 0 for rank 0
    gap = (mu1.double() - mu2.double()).square().sum()
    return max(float(gap + cov1.double().trace() + cov2.double().trace() - 2 * cross), 0.0)


def _squared_distances(a, b, rows=1000):
    """Blocks (start, (n, len(b))) of the squared distances of a's rows to all of b's.

    A block has `rows` rows of a.
    """
    for i in range(0, len(a), rows):
        part = a[i:i + rows]
        norms = part.square().sum(1, keepdim=True) + b.square().sum(1)
        yield i, torch.addmm(norms, part, b.T, alpha=-2).clamp_min(0)


def _radii(x, k):
    """Squared distance of each row of x (N, D) to its 1st, ..., k-th nearest other row: (N, k)."""
    near = []
    for i, d in _squared_distances(x, x):
        d[:, i:].fill_diagonal_(math.inf)  # no row is its own neighbour
        near.append(d.topk(k, largest=False).values)
    return torch.cat(near)


def neighbours(real, fake):
    """precision, recall (k = 3), density, coverage (k = 5) of fake (M, D) against real (N, D).

    Returns a dict. A ball reaches from each point to its k-th nearest neighbour in its own set.
    Precision and recall count points on the rim, as Kynkaanniemi 2019; density and coverage do not,
    as Naeem 2020's program: equal sets get density 1.
    """
    if min(len(real), len(fake)) < 6:
        raise ValueError(f"{len(fake)} samples against {len(real)} real ones are too few: 6 is the "
                         "least")
    centre = real.double().mean(0)  # small numbers: less cancels in the distances
    real, fake = real.double() - centre, fake.double() - centre
    real_near = _radii(real, 5)
    fake3 = _radii(fake, 3)[:, 2]
    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled = dense = covered = 0
    for i, d in _squared_distances(real, fake):  # d: (rows of real, M)
        real3 = real_near[i:i + len(d), 2, None]
        real5 = real_near[i:i + len(d), 4, None]
        precise |= (d <= real3).any(0)
        recalled += int((d <= fake3).any(1).sum())
        dense += int((d < real5).sum())
        covered += int((d < real5).any(1).sum())
    return {"precision": float(precise.double().mean()),
            "recall": recalled / len(real),
            "density": dense / (5 * len(fake)),
            "coverage": covered / len(real)}


def sliced_wasserstein(x, y, projections=256):
    """Mean over fixed directions of the exact 1-Wasserstein distance of x (N, D) and y (M, D).

    It is the distance of the two sets as projected on each direction.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], projections, dtype=torch.float64, generator=generator)
    directions /= directions.norm(dim=0)
    x = (x.double() @ directions).sort(0).values
    y = (y.double() @ directions).sort(0).values
    n, m = len(x), len(y)
    # both quantile functions are steps, rising at i/n and j/m: integrate the gap over all steps
    edges = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = edges.diff(prepend=edges.new_zeros(1)).double() / (n * m)
    gap = x[(edges + m - 1) // m - 1] - y[(edges + n - 1) // n - 1]
    return float((gap.abs() * width[:, None]).sum(0).mean())


def kl(counts, target):
    """KL(counts / sum || target) in nats: counts (K,); target (K,), positive of sum one, or 1/K."""
    p = counts.double() / counts.sum()
    return float(torch.special.xlogy(p, p / target).sum())


def grid_modes(points, centres, sigma):
    """Modes of a mixture of Gaussians from points (N, 2), centres (K, 2) and their sigma.

    Returns a dict of floats. within: share of points at most 3 sigma from a centre. modes: centres
    with at least 20 such points for each 10,000 drawn, and at least one. spread: the standard
    deviation of these points about the mean of their mode, in sigma: 0.97 for the mixture itself,
    whose tails are cut. kl: all points, each counted for its nearest centre, to the uniform
    distribution.
    """
    points = points.double()
    k = len(centres)
    distance, nearest = torch.cdist(points, centres.double()).min(1)
    within = distance <= 3 * sigma
    near, mode = points[within], nearest[within]
    count = mode.bincount(minlength=k)
    total = torch.zeros(k, 2, dtype=torch.float64).index_add(0, mode, near)
    mean = total / count.clamp(min=1)[:, None]
    spread = (near - mean[mode]).square().sum().div(2 * max(1, len(near))).sqrt() / sigma
    enough = max(1.0, len(points) * 20 / 10_000)
    return {"modes": float((count >= enough).sum()),
            "modes_of": float(k),
            "within": float(within.double().mean()),
            "spread": float(spread),
            "kl": kl(nearest.bincount(minlength=k), 1 / k)}


def on_curve(points, curve, sigma):
    """Points (N, 2) about a curve, given as many of its points (K, 2): a dict of floats.

    on_curve: the share at most 3 sigma from it (0.9973 of what is noised by sigma, and lies about a
    straight line). std: the root of the mean of both coordinates' variances.
    """
    points = points.double()
    blocks = [d.min(1).values for _, d in _squared_distances(points, curve.double())]
    distance = torch.cat(blocks).sqrt()
    return {"on_curve": float((distance <= 3 * sigma).double().mean()),
            "std": float(points.var(0).mean().sqrt())}


def inception_score(probabilities, block=5000):
    """exp of the mean of KL(p(y|x) || p(y)), p (N, K).

    It is taken over equal blocks of at most 5,000, and the mean of these returned.
    """
    def xlogx(p):
        return torch.special.xlogy(p, p).sum(-1)

    scores = []
    for p in probabilities.double().chunk(math.ceil(len(probabilities) / block)):
        scores.append((xlogx(p).mean() - xlogx(p.mean(0))).exp())
    return float(torch.stack(scores).mean())


# ------------------------------------------------------------------------------------- classifier
class Classifier(nn.Module):
    """x (B, C, H, W) in [-1, 1] -> features (B, 160), logits (B, classes).

    A strided first layer brings any size to at most 16 x 16; three pre-norm residual stages, halved
    between. The stream itself is never normalised, so that wrong contrast and brightness reach the
    features, and all stages feed them: slight blur weighs twice what it does with the last alone,
    at the same floor.
    """

    def __init__(self, channels, side, classes):
        super().__init__()
        stride = math.ceil(side / 16)
        widths = (32, 64, 64)
        self.stem = nn.Conv2d(channels, widths[0], stride + 2, stride, 1)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1),
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, w, 3, padding=1)) for w in widths)
        self.down = nn.ModuleList(
            [nn.Identity()] + [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:])])
        self.head = nn.Linear(sum(widths), classes)
        self.register_buffer("scale", torch.ones(()))  # set after training: total variance 100

    def forward(self, x):
        x = self.stem(x)
        means = []
        for down, block in zip(self.down, self.blocks):
            x = down(x)
            x = x + block(x)
            means.append(F.silu(x).mean((2, 3)))
        features = torch.cat(means, 1)
        return features * self.scale, self.head(features)


def _unit(images, device):
    """uint8 (B, C, H, W) -> float32 in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


def _turned(x):
    """(B, C, H, H) -> its four rotations (4 B, C, H, H), and which one each is (4 B,)."""
    y = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return torch.cat([x.rot90(k, (2, 3)) for k in range(4)]), y


def choice(n, most):
    """At most `most` of the indices 0..n-1, int64, in a random order that never changes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most]


def _bar(total, text):
    return progress(text=text, total=total, unit=" images")


def digest(dataset):
    """16 hex digits that change with the data.

    They are those of shape, classes, number, all labels, and 256 pictures.
    """
    index = torch.arange(256) * (len(dataset) - 1) // 255
    head = (tuple(dataset.shape), list(dataset.classes), len(dataset))
    key = hashlib.sha256(repr(head).encode())
    key.update(dataset.labels.contiguous().numpy().tobytes())
    key.update(dataset.images[index].contiguous().numpy().tobytes())
    return key.hexdigest()[:16]


def _kept(path, key):
    """The dict kept in `path` under that key, or None."""
    try:
        kept = unpickled(path)
        return kept if kept["key"] == key else None
    except FileNotFoundError:
        return None
    except Exception as error:
        # cut, foreign or malicious: nothing in it ran, and it can be made again
        print(f"{path} is damaged ({type(error).__name__}): making it again", file=sys.stderr)
        return None


_unkept = set()  # files that could not be written, each told once


def _keep(path, kept):
    """Write the dict to `path`; where that fails, say so, once."""
    try:
        save_tensors(path, kept)
    except OSError as error:  # a read-only data root costs time, not the result
        if path not in _unkept:
            print(f"{path} cannot be kept, and will be made again next time: {error}",
                  file=sys.stderr)
        _unkept.add(path)


def _cached(path, key, make):
    """The dict kept in `path`, if it was kept under the same key; else make(), and keep it."""
    kept = _kept(path, key)
    if kept is None:
        kept = {"key": key, **make()}
        _keep(path, kept)
    return kept


def _network(dataset):
    """An untrained Classifier for the data set, always the same.

    The global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed reseeds GPUs
        classes = len(dataset.classes) if len(dataset.classes) > 1 else 4
        return Classifier(dataset.shape[0], dataset.shape[1], classes)


def _risen(looks):
    """Whether held-out accuracy, at each look so far, may still rise."""
    best = looks.index(max(looks)) if looks else 0
    return not looks or looks[best] < 1 and len(looks) - 1 - best < PATIENCE


def _train(train, test, device, partial):
    """A classifier trained on `train` and measured on `test` -> {"state", "accuracy"}.

    With fewer than two classes its task is which of four rotations a picture is shown in. Its seed
    is fixed. From time to time its state is kept in the file `partial`, from which it goes on when
    it was interrupted.
    """
    began = time.perf_counter()
    channels, height, width = train.shape
    labelled = len(train.classes) > 1
    generator = torch.Generator().manual_seed(0)
    updates = UPDATES[channels]
    net = _network(train).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    usable = (train.labels >= 0).nonzero().flatten() if labelled else torch.arange(len(train))
    pad = max(1, height // 16)

    def batch(images, labels, index):
        x = _unit(images[index], device)
        return (x, labels[index].to(device)) if labelled else _turned(x)

    def right(most):
        """The share of at most so many held-out pictures that it gets right; None: no labels."""
        index = choice(len(test), most)
        if labelled:
            index = index[test.labels[index] >= 0]
        if not len(index):
            return None
        found = []
        with torch.no_grad():
            for part in index.split(250):
                x, y = batch(test.images, test.labels, part)
                found.append((net(x)[1].argmax(1) == y).cpu())
        return float(torch.cat(found).double().mean())

    def rate(step, last):
        """Of an update, of which `last` is to be the last one, if that is known."""
        if channels == 1:  # a warm-up over a tenth, then down to zero
            done = step / updates
            return min(10 * done + 10 / updates, (1 - done) / 0.9)
        return min(1, (step + 1) / 100) * (1 if last == updates else (last - step) / COOL)

    step, last, looks = 0, updates, []
    kept = _kept(partial, f"{RECIPE}, {updates}")
    if kept:
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
        generator.set_state(kept["generator"])
        step, last, looks = kept["step"], kept["last"], kept["looks"]
    first, kept_at = step, began
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with exact, _bar(64 * updates, "classifier") as bar:
        while step < last:
            if channels == 3 and last == updates and step and step % CHECK == 0:
                looks.append(right(1000) or 0.0)
                if not _risen(looks) or step + COOL >= updates:
                    last = min(step + COOL, updates - 1)
            optimizer.param_groups[0]["lr"] = 3e-3 * rate(step, last)
            chosen = torch.randint(len(usable), (64 if labelled else 16,), generator=generator)
            x, y = batch(train.images, train.labels, usable[chosen])
            top, left = torch.randint(2 * pad + 1, (2,), generator=generator).tolist()
            x = F.pad(x, (pad,) * 4, mode="replicate")[:, :, top:top + height, left:left + width]
            if channels == 3 and train.name != "words" and step % 2:
                x = x.flip(3)  # in colour: photographs; a mirrored digit is no digit
            loss = F.cross_entropy(net(x)[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.update(len(x))
            now = time.perf_counter()
            if step == first + 10:
                warm = now
            if step == first + 40:
                minutes = (now - warm) / 30 * (updates - first) / 60
                print(f"the classifier that judges {train.name} is trained once, for at most "
                      f"{updates} updates, {minutes:.1f} minutes at this pace", file=sys.stderr)
            if step % 50 == 1:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if now - kept_at > KEEP_EVERY:
                kept_at = now
                _keep(partial, dict(key=f"{RECIPE}, {updates}", net=net.state_dict(), last=last,
                                    optimizer=optimizer.state_dict(), step=step, looks=looks,
                                    generator=generator.get_state()))
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
    accuracy = right(10_000)
    features, _ = look(net, train.images, choice(len(train), 2000), device)
    variance = float(features.var(0).sum())
    net.scale.fill_(10 / max(variance, 1e-12) ** 0.5)
    what = "pictures" if labelled else "rotations"
    seconds = time.perf_counter() - began
    share = "no" if accuracy is None else f"{accuracy:.2%} of"
    print(f"classifier: {share} held-out {what} right after {step} updates, "
          f"{seconds:.0f} s", file=sys.stderr)
    return {"state": {k: v.cpu() for k, v in net.state_dict().items()}, "accuracy": accuracy}


def classifier(name, root="data", size=None, seed=0, device="cpu"):
    """The evaluation network of a data set, trained on first use.

    Returns the Classifier, its accuracy, the names of its classes. It learns all classes of the
    source, or, where there are fewer than two, which of four rotations a picture is shown in (no
    class names). It is kept as root/classifier-<key>.pt; other data has another key, and trains
    another one.
    """
    train = data.load(name, root, size, None, "train", seed)
    key = f"{data.title(name)}-{train.shape[-1]}-{digest(train)}"

    def make():
        test = data.load(name, root, size, None, "test", seed)
        return _train(train, test, device, Path(root, f".classifier-{key}-begun.pt"))

    kept = _cached(os.path.join(root, f"classifier-{key}.pt"),
                   f"{RECIPE}, {UPDATES[train.shape[0]]}, {key}", make)
    net = _network(train)
    net.load_state_dict(kept["state"])
    names = list(train.classes) if len(train.classes) > 1 else []
    return net.to(device).eval(), kept["accuracy"], names


@torch.no_grad()
def look(net, images, index, device="cpu"):
    """Features (N, 160) and logits (N, classes) of the uint8 pictures images[index].

    Both are float64 on the CPU. A network of one channel sees three channels one by one: features
    (N, 3 * 160), logits (N, 3, classes).
    """
    features, logits = [], []
    for part in index.split(250):
        x = _unit(images[part], device)
        apart = x.shape[1] != net.stem.in_channels
        f, y = net(x.flatten(0, 1)[:, None] if apart else x)
        if apart:
            y = y.unflatten(0, (len(part), -1))
        features.append(f.reshape(len(part), -1).cpu().double())
        logits.append(y.cpu().double())
    return torch.cat(features), torch.cat(logits)


def known(net, dataset, count, root, device="cpu"):
    """Features of at most `count` of a data set's pictures, by a fixed choice, and their moments.

    Returns (n, D) and moments' two, float64, or None in place of these for fewer than two pictures.
    They are computed once and kept under root; another classifier or other pictures have other
    keys.
    """
    index = choice(len(dataset), count)
    weights = hashlib.sha256()
    for value in net.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    files = 0 if dataset.hashes is None else int(dataset.hashes.sum())
    key = (f"features 1, {digest(dataset)}, {files}, {weights.hexdigest()[:16]}, {len(index)}, "
           f"{torch.device(device).type}")

    def make():
        features, _ = look(net, dataset.images, index, device)
        kept = {"features": features.float()}  # as the network gave them
        if len(index) > 1:
            kept["mean"], kept["covariance"] = moments([features])
        return kept

    digits = hashlib.sha256(key.encode()).hexdigest()[:16]
    kept = _cached(os.path.join(root, f"features-{digits}.pt"), key, make)
    gaussian = (kept["mean"], kept["covariance"]) if len(index) > 1 else None
    return kept["features"].double(), gaussian


def references(net, train, test, n, root, device="cpu"):
    """What n samples are compared with: features and moments of training pictures, held-out ones.

    These are up to five separate draws of n: one alone is a noisy floor.
    """
    real, gaussian = known(net, train, REFERENCE, root, device)
    held_out, _ = known(net, test, draws_of(n, len(test)) * n, root, device)
    return real, gaussian, held_out


def draws_of(n, held_out):
    """How many separate draws of n, up to five, and at least one, the held-out ones allow."""
    return max(1, min(5, held_out // n))


# ------------------------------------------------------------------------------ FID and IS proper
def load_inception(path, device="cpu"):
    """A TorchScript file as a function of uint8 (B, C, H, W).

    It returns features (B, 2048) and probabilities (B, K) or None. The usual export is taken, whose
    forward has return_features and no_output_bias, and a plain one that returns the features or
    (features, logits). ValueError for anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: --inception wants the network as a "
                                "TorchScript file")
    try:
        net = torch.jit.load(path, map_location=device).eval()
        flags = {argument.name for argument in net.forward.schema.arguments}
    except Exception:
        raise ValueError(f"{path} is no TorchScript network: give --inception one") from None

    @torch.no_grad()
    def call(images):
        x = images.to(device).expand(-1, 3, -1, -1).contiguous()
        try:
            if "return_features" in flags:
                features = net(x, return_features=True)
                probabilities = None
                if "no_output_bias" in flags:
                    probabilities = net(x, no_output_bias=True)
            else:
                out = net(x)
                features, logits = out if isinstance(out, tuple) else (out, None)
                probabilities = None if logits is None else logits.double().softmax(1)
            if features.shape != (len(x), 2048):
                raise ValueError(f"its features are {tuple(features.shape)}")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ValueError(f"{path} does not turn uint8 {tuple(x.shape)} into features "
                             f"{(len(x), 2048)}: give the standard Inception network "
                             f"({reason})") from None
        if probabilities is not None:
            probabilities = probabilities.cpu().double()
        return features.cpu().double(), probabilities
    return call


def _fid_and_is(call, samples, train, path, root):
    """FID against all training pictures, and IS if there are classes.

    The moments of the training pictures are kept under root.
    """
    probabilities = []
    with open(path, "rb") as file:
        key = f"{digest(train)}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    def features(images, text, keep):
        with _bar(len(images), f"Inception, {text}") as bar:
            for part in torch.arange(len(images)).split(50):
                found, p = call(images[part])
                if keep and p is not None:
                    probabilities.append(p)
                bar.update(len(part))
                yield found

    def reference():
        mu, cov = moments(features(train.images, "reference", False))
        return {"mu": mu, "cov": cov}

    fake = moments(features(samples, "samples", True))
    real = _cached(os.path.join(root, f"inception-{key}.pt"), key, reference)
    result = {"fid": frechet(*fake, real["mu"], real["cov"])}
    if probabilities:
        result["is"] = inception_score(torch.cat(probabilities))
    return result


# -------------------------------------------------------------------------------------- all of it
def _check(samples, train):
    dtype = torch.float32 if train.images is None else torch.uint8
    dtype_is = getattr(samples, "dtype", type(samples))
    shape_is = tuple(getattr(samples, "shape", ()))
    if dtype_is != dtype or shape_is[1:] != tuple(train.shape):
        raise ValueError(f"samples of {train.name} are {dtype} (N, {str(tuple(train.shape))[1:]}, "
                         f"not {dtype_is} {shape_is}: evaluate with the data, size and classes of "
                         "the training")
    if len(samples) < 6:
        raise ValueError(f"{len(samples)} samples are too few to judge: draw at least 6, better "
                         "1000")
    if not torch.isfinite(samples).all():
        raise ValueError("some samples are not finite: sample from another checkpoint")


def _class_shares(logits, train, names):
    """Classes of samples by logits (N, all classes) beside the data's.

    They are compared by KL, and by the extreme relative shares.
    """
    true = train.labels[train.labels >= 0].bincount(minlength=len(train.classes)).double()
    true = true / true.sum()
    columns = [names.index(c) for c in train.classes]
    likeliest = logits[:, columns].argmax(1)  # of the kept
    counts = likeliest.bincount(minlength=len(true))
    least, most = (counts / len(logits) / true).aminmax()
    return {"class_kl": kl(counts, true), "class_least": float(least), "class_most": float(most)}


def computable(n, trained, held_out):
    """Which of distance, floor, neighbours so many samples and pictures allow, and why not all."""
    able, lacks = [], []
    for what, enough, why in (
            ("distance", trained >= 2, f"no distance: {trained} picture to compare with"),
            ("floor", trained >= 2 and held_out >= 2, f"no floor: {held_out} picture is held out"),
            ("neighbours", trained >= 6, "no precision, recall, density, coverage: "
                                         f"{trained} pictures to compare with, 6 is the least")):
        (able if enough else lacks).append(what if enough else why)
    return able, lacks


def prepare(c):
    """Before a script draws what --evaluate judges: settle what can be judged, and say the rest.

    Stops for too few samples, for other data than the model's, for data that cannot be judged. The
    classifier is trained now, if it has not been.
    """
    n = c.n or 1000
    with inputs():
        size, most = c.size or None, flags.most(c)
        train = data.load(c.data, c.data_root, size, c.chosen or None, most=most)
        data.same(c.content, train, c.checkpoint)
        data.judgeable(train, n)
        if train.images is None:
            return
        for lack in computable(n, len(train), train.held_out)[1]:
            print(lack, file=sys.stderr)
        source = "digits" if c.data == "stacked" else c.data
        classifier(source, c.data_root, train.shape[-1], device=c.device)


def evaluate(samples, name, root="data", size=None, classes=None, seed=0, inception=None,
             device="cpu"):
    """Judge samples, uint8 (N, C, H, W) or float32 points (N, 2) on the CPU.

    Returns a dict of floats, in order. name to seed say which data, as data.load takes them (the
    data's seed, not the run's); inception: a file or None.
    Pictures: samples, accuracy (the classifier's), fcd, fcd_floor, floor_n, precision, recall,
    density, coverage; with two classes or more class_kl, class_least, class_most (predicted
    classes, shares as multiples of the data's); for `stacked` modes, modes_of, kl instead; with
    `inception` fid, is.
    Points: samples, wasserstein, wasserstein_floor, floor_n, precision to coverage; for `gaussians`
    modes, modes_of, within (3 sigma), spread (in sigma), kl; for `swirl` on_curve (3 sigma), std,
    and of the held-out points on_curve_of_data, std_of_data.

    The reference is the training pictures of the kept classes, 20,000 by a fixed choice where there
    are more. The floor is that of floor_n held-out pictures: as many as samples (the mean of up to
    five separate draws), or all where they are fewer. Precision to coverage compare the samples
    with the first draw, or, where too few are held out, with as many of the reference; at most
    10,000 of each.
    """
    train = data.load(name, root, size, classes, "train", seed)
    test = data.load(name, root, size, classes, "test", seed)
    _check(samples, train)
    n = len(samples)
    device = torch.device(device)
    stacked = name == "stacked"
    if inception:
        if train.images is None:
            raise ValueError(f"--inception is for pictures, and {name} has points: leave it out")
        call = load_inception(inception, device)
        call(samples[:1])  # a wrong file is told before a minute of work
    able, _ = computable(n, len(train), len(test))
    draws = draws_of(n, len(test))
    result = {"samples": float(n)}
    if train.images is None:
        fake = samples.double()
        reference = train.points[choice(len(train), REFERENCE)]
        held_out = test.points[choice(len(test), draws * n)]
        distance = "wasserstein"

        def measure(x):
            return sliced_wasserstein(x, reference)
    else:
        # `stacked`: the digits' classifier sees each channel, so that 1,000 modes are three digits
        source = "digits" if stacked else name
        net, accuracy, names = classifier(source, root, train.shape[-1], seed, device)
        if accuracy is not None:
            result["accuracy"] = accuracy
        fake, logits = look(net, samples, torch.arange(n), device)
        reference, gaussian, held_out = references(net, train, test, n, root, device)
        distance = "fcd"

        def measure(x):
            return frechet(*moments([x]), *gaussian)

    if "distance" in able:
        result[distance] = measure(fake)
    if "floor" in able:
        result[distance + "_floor"] = sum(measure(x) for x in held_out.chunk(draws)) / draws
        result["floor_n"] = float(len(held_out) // draws)
    real = held_out[:n] if len(held_out) >= n else reference[:n]
    if "neighbours" in able:
        result |= neighbours(real[:NEIGHBOURS], fake[:NEIGHBOURS])
    if name == "gaussians":
        result |= grid_modes(fake, data.GAUSSIANS_MEANS, data.GAUSSIANS_SIGMA)
    elif name == "swirl":
        curve = data.swirl_curve(torch.linspace(0, 1, 2000))
        result |= on_curve(fake, curve, data.SWIRL_SIGMA)
        of_data = on_curve(test.points, curve, data.SWIRL_SIGMA)
        result |= {f"{key}_of_data": value for key, value in of_data.items()}
    elif stacked:
        numbers = logits.argmax(2) @ torch.tensor([100, 10, 1])
        found = numbers.bincount(minlength=1000)
        result |= {"modes": float((found > 0).sum()),
                   "modes_of": 1000.0,
                   "kl": kl(found, 1 / 1000)}
    elif len(train.classes) > 1 and train.images is not None:
        result |= _class_shares(logits, train, names)
    if inception:
        result |= _fid_and_is(call, samples, train, inception, root)
    return result


def fcd(c, images):
    """The FCD of uint8 pictures (N, C, H, W) to the training pictures, as `evaluate` has it.

    c: a script's flags. None where too few pictures are there for it.
    """
    train = data.load(c.data, c.data_root, c.size or None, c.chosen or None)
    able = computable(len(images), len(train), train.held_out)[0]
    if len(images) < 2 or "distance" not in able:
        return None
    source = "digits" if c.data == "stacked" else c.data
    net, _, _ = classifier(source, c.data_root, train.shape[-1], device=c.device)
    _, gaussian = known(net, train, REFERENCE, c.data_root, c.device)
    fake, _ = look(net, images, torch.arange(len(images)), c.device)
    return frechet(*moments([fake]), *gaussian)


def as_asked(c, samples, captions):
    """How often pictures of `words` show what was asked for: {"asked_digit": share, ...}.

    samples (n, 3, H, W) in [-1, 1]; captions: n texts. Beside each share, under "real_digit" and so
    on, the same of held-out pictures with their own captions: more than that cannot be had. The
    digit is what the classifier sees; all else is measured (words.py).
    """
    train, test = (data.load(c.data, c.data_root, c.size or None, c.chosen or None, split)
                   for split in ("train", "test"))
    net, _, names = classifier(c.data, c.data_root, train.shape[-1], device=c.device)
    number = torch.tensor([words.ATTRIBUTES["digit"].index(name) for name in names])
    some = choice(len(train), 2000)
    bold = words.halfway(train.images[some], [train.caption(i) for i in some])

    def shares(images, captions):
        _, logits = look(net, images, torch.arange(len(images)), c.device)
        seen = dict(digit=number[logits.argmax(1)]) | words.measured(images, bold)
        return words.shares(seen, captions)

    held_out = choice(len(test), 2000)
    real = shares(test.images[held_out], [test.caption(i) for i in held_out])
    result = {}
    for name, share in shares(to_uint8(samples), captions).items():
        result |= {f"asked_{name}": share, f"real_{name}": real[name]}
    return result


def report(result):
    """The dict of `evaluate` as aligned lines of text.

    Distances stand beside their floors, and what has no label here under its key.
    """
    floor = ""
    for distance in ("fcd", "wasserstein"):
        if f"{distance}_floor" in result:
            floor = f"  (floor {{{distance}_floor:.4g}}, from {{floor_n:.0f}} held-out)"
    rows = {
        "accuracy": ("classifier", "{accuracy:.2%} right on held-out data"),
        "fcd": ("FCD", "{fcd:.4g}" + floor),
        "wasserstein": ("sliced Wasserstein", "{wasserstein:.4g}" + floor),
        "class_kl": ("classes, KL to the data", "{class_kl:.4f}"),
        "class_least": ("class shares", "{class_least:.2f} to {class_most:.2f} times the data's"),
        "modes": ("modes found", "{modes:.0f} of {modes_of:.0f}"),
        "within": ("within 3 sigma", "{within:.2%}"),
        "on_curve": ("within 3 sigma of the curve",
                     "{on_curve:.2%}  (the data's {on_curve_of_data:.2%})"),
        "std": ("standard deviation", "{std:.4f}  (the data's {std_of_data:.4f})"),
        "spread": ("spread of a mode", "{spread:.2f} sigma  (the data's 0.97)"),
        "kl": ("modes, KL to uniform", "{kl:.4f}"),
        "fid": ("FID", "{fid:.4g}"),
        "is": ("IS", "{is:.4g}"),
    }
    for name in words.ATTRIBUTES:
        rows[f"asked_{name}"] = (f"{name} as asked for", f"{{asked_{name}:.1%}}  (real pictures' "
                                 f"{{real_{name}:.1%}})")
    # shown beside another
    beside = ("fcd_floor", "wasserstein_floor", "floor_n", "class_most", "modes_of",
              "on_curve_of_data", "std_of_data", *(f"real_{name}" for name in words.ATTRIBUTES))
    lines = []
    for key, value in result.items():
        if key in beside:
            continue
        if key in rows:
            label, text = rows[key]
            lines.append((label, text.format(**result)))
        else:
            lines.append((key, f"{value:.0f}" if value >= 1000 else f"{value:.4g}"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def peak_memory(device="cpu"):
    """The most memory used so far, in MiB.

    It is that of PyTorch on a CUDA device, of the whole process elsewhere.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows keeps no such count
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on macOS bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------------------------- for the scripts
def judge(c, draw, evaluations):
    """`evaluate` for a script's --evaluate, and the speed.

    c: the script's flags; draw: the Draw (sampling.py) that keeps the samples, pictures in [-1, 1]
    or points, and timed them; evaluations: of the network for each sample. A file that cannot be
    read ends the program with one line.
    """
    x = draw.samples()
    speed = {"network evaluations": evaluations,
             "ms per sample": draw.ms(),
             "peak memory MiB": peak_memory(c.device)}
    with inputs():
        result = evaluate(x if x.ndim == 2 else to_uint8(x), c.data, c.data_root, c.size or None,
                          c.chosen or None, inception=c.inception or None, device=c.device)
    return result | speed


def write_result(c, result):
    """Print the table and keep it as evaluation.json in the run, with how the samples were drawn.

    That is the latest; each is evaluations/<network evaluations>-<seed>-<samples>.json too. Where
    it cannot be written, a full disk say, the program ends with one line.
    """
    result = result | {"updates": c.updates, "minutes of training": round(c.spent, 2)}
    print(report(result))
    drawn = {name: getattr(c, name) for name, field in c.fields.items()
             if field.metadata["use"] == "sample evaluate" and name not in ("n", "steps")}
    kept = result | drawn | {"seed": c.seed}
    own = f"{result['network evaluations']}-{c.seed}-{int(result['samples'])}.json"
    for path in (c.run / "evaluations" / own, c.run / "evaluation.json"):
        with inputs(), written(path) as file:
            file.write_text(json.dumps(kept, indent=2) + "\n")
