import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.testing import assert_close

from common import data
from conftest import ROOT


# ------------------------------------------------------------------------------------------ helpers
def encoded(pixels, form="png", mode=None, **options):
    """The bytes of a picture file. pixels: array, grey value of a 4 x 4 picture, or a PIL
    picture."""
    if isinstance(pixels, int):
        pixels = np.full((4, 4), pixels, np.uint8)
    picture = (pixels if isinstance(pixels, Image.Image)
               else Image.fromarray(np.ascontiguousarray(pixels)))
    out = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(out, form, **options)
    return out.getvalue()


def folder(path, files):
    """Write {name: bytes} under path."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def archive(path, files):
    """Write {name: bytes, or None for a symbolic link to /etc/hostname} as the archive that path's
    name promises."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in files.items():
                z.writestr(name, content)
        return path
    with tarfile.open(
            path, {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")) as t:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
                t.addfile(member)
            else:
                member.size = len(content)
                t.addfile(member, io.BytesIO(content))
    return path


def pixels(tmp_path, content, size=None, name="picture.png"):
    """What a set of this one picture holds: (C, size, size) int array."""
    source = folder(tmp_path / hashlib.md5(content).hexdigest() / str(size), {name: content})
    images = data.load(source, tmp_path / "root", size).images
    assert images.dtype == torch.uint8 and len(images) == 1
    return images[0].numpy().astype(int)


def values(dataset):
    """The first value of each picture: which picture it is, where each has one value."""
    return dataset.images[:, 0, 0, 0].tolist()


def fails(*args, match, **kwargs):
    """load() must raise an error of one line that matches."""
    with pytest.raises((ValueError, OSError), match=match) as error:
        data.load(*args, **kwargs)
    assert "\n" not in str(error.value)


def everything(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*")) if root.exists() else []


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


# -------------------------------------------------------------------------------------------- batch
def test_batch_scales_every_byte_exactly():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, label = data.Dataset("x", images, None, torch.tensor([2, 0, -1, 1]), list("abc"),
                            (1, 8, 8)).batch(torch.tensor([3, 1]))
    assert x.dtype == torch.float32 and label.tolist() == [1, 0]
    assert torch.equal(x, images[[3, 1]].float() / 127.5 - 1)
    whole = data.Dataset("x", images, None, torch.zeros(4), [],
                         (1, 8, 8)).batch(torch.arange(4))[0].flatten()
    assert whole[0] == -1 and whole[255] == 1
    # one rounding of 1 + x
    assert_close(whole.double(), torch.arange(256).double() / 127.5 - 1, rtol=0, atol=1.2e-7)
    assert torch.equal((whole * 127.5 + 127.5).round().byte(), torch.arange(256).byte())


def test_batch_flips_and_follows_the_index(drawn):
    train = data.load("digits", drawn)
    index = torch.tensor([5, 17_999, 0, 5, 300])
    flip = torch.tensor([True, False, True, False, False])
    x, label = train.batch(index, flip=flip)
    plain, _ = train.batch(index)
    assert x.shape == (5, 1, 16, 16) and label.tolist() == train.labels[index].tolist()
    assert torch.equal(x[~flip], plain[~flip]) and torch.equal(x[flip], plain[flip].flip(-1))
    assert not torch.equal(x[0], plain[0]) and torch.equal(plain[0], plain[3])
    order = torch.tensor([4, 2, 0, 1, 3])
    again, moved = train.batch(index[order], flip=flip[order])
    assert torch.equal(again, x[order]) and torch.equal(moved, label[order])


# --------------------------------------------------------------------------------------- drawn sets
def test_digits_are_a_function_of_the_seed(drawn, root):
    (first, labels), (again, _), (other, _) = (data._draw_digits(16, seed, 500)
                                               for seed in (3, 3, 4))
    assert (first.shape == (500, 1, 16, 16) and first.dtype == np.uint8
            and np.array_equal(first, again))
    assert not np.array_equal(first, other) and np.bincount(labels).tolist() == [50] * 10
    a, b = data.load("digits", drawn), data.load("digits", root)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_digits_are_ten_legible_classes_with_a_tenth_held_out(drawn):
    train, test = data.load("digits", drawn), data.load("digits", drawn, split="test")
    assert (len(train), len(test)) == (18_000, 2_000) and train.shape == (1, 16, 16)
    assert train.classes == test.classes == [str(d) for d in range(10)]
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == [2_000] * 10
    rows = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    # all differ, none is in both
    assert len(rows[0]) == 18_000 and len(rows[1]) == 2_000 and not rows[0] & rows[1]
    flat, seen = train.images.flatten(1).float(), test.images.flatten(1).float()
    nearest = torch.cdist(seen[::4], flat).argmin(1)
    # 0.1 if labels did not belong
    assert (train.labels[nearest] == test.labels[::4]).float().mean() > 0.9
    # they vary; white on black
    assert flat.std(0).mean() > 30 and flat.max() == 255 and flat[:, 0].mean() < 40


@pytest.mark.parametrize("size", (4, 9, 50, 130))
def test_digits_of_any_size(size):
    images, _ = data._draw_digits(size, 0, 20)
    assert images.shape == (20, 1, size, size) and (images.reshape(20, -1).max(1) > 50).all()


def test_stacked_digits_carry_their_labels(drawn):
    for split, count in (("train", 50_000), ("test", 5_000)):
        digits, stacks = (data.load("digits", drawn, split=split),
                          data.load("stacked", drawn, split=split))
        known = {image.numpy().tobytes(): int(label)
                 for image, label in zip(digits.images, digits.labels)}
        assert len(stacks) == count and stacks.shape == (3, 16, 16)
        assert len(stacks.classes) == 1000 and stacks.classes[7] == "007"
        assert len(stacks.labels.unique()) > (990 if split == "train" else 900)
        chosen = torch.randint(count, (500,), generator=torch.Generator().manual_seed(0))
        for image, label in zip(stacks.images[chosen], stacks.labels[chosen].tolist()):
            assert [known[channel.numpy().tobytes()] for channel in image] == [
                int(d) for d in f"{label:03}"]


def test_gaussians_are_the_stated_grid():
    train, test = data.load("gaussians"), data.load("gaussians", split="test")
    assert (train.images is None and train.points.dtype == torch.float32 and train.shape == (2,)
            and train.classes == [])
    assert (train.labels.tolist() == [-1] * len(train) and len(train) >= 10_000
            and len(test) >= 1_000)
    # spacing 2 where sigma is 0.05
    line = (torch.arange(5.0) - 2) * 2 * data.GAUSSIANS_SIGMA / 0.05
    means = torch.cartesian_prod(line, line)
    assert_close(data.GAUSSIANS_MEANS, means)
    for part in (train, test):
        near = torch.cdist(part.points, means).argmin(1)
        rest, n, share = ((part.points - means[near]) / data.GAUSSIANS_SIGMA, len(part),
                          len(part) / 25)
        assert part.points.abs().max() <= 1
        assert ((near.bincount(minlength=25) - share).abs() < 5 * share ** 0.5).all()
        # five standard errors
        assert_close(rest.T @ rest / n, torch.eye(2), rtol=0, atol=5 * (2 / n) ** 0.5)
        assert rest.mean(0).abs().max() < 5 / n ** 0.5


def test_swirl_is_one_and_a_half_turns():
    train, test = data.load("swirl"), data.load("swirl", split="test")
    for part in (train, test):
        x, y = part.points.double().T
        assert part.points.abs().max() <= 1 and part.images is None
        # turns already made, by the radius
        winding = ((x.hypot(y) / 0.95 * 4.5 * np.pi - torch.atan2(y, x)) / (2 * np.pi)).round()
        angle = torch.atan2(y, x) + 2 * np.pi * winding
        assert (x.hypot(y) - 0.95 * angle / (4.5 * np.pi)).std() < 0.013  # noise of 0.01
        turns = (angle / np.pi - 1.5) / 3  # uniform in [0, 1]
        assert ((turns > -0.02) & (turns < 1.02)).all()
        assert (abs(turns.mean() - 0.5) < 5 * (1 / 12 / len(part)) ** 0.5
                and abs(turns.var() - 1 / 12) < 0.01)
    assert len(train) == 1024


@pytest.mark.parametrize("name", ("swirl", "gaussians"))
def test_points_are_a_function_of_seed_and_split(name):
    a, b, c, d = (data.load(name, seed=s, split=t).points
                  for s, t in ((0, "train"), (0, "train"), (1, "train"), (0, "test")))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not set(map(tuple, a.tolist())) & (
        set(map(tuple, c.tolist())) | set(map(tuple, d.tolist())))
    points, label = data.load(name).batch(torch.tensor([7, 1]))
    assert torch.equal(points, a[[7, 1]]) and label.tolist() == [-1, -1]
    fails(name, size=8, match="points")
    fails(name, classes=["a"], match="points")


# ------------------------------------------------------------------------------- MNIST in IDX files
rng = np.random.default_rng(0)
TRAIN, TEST = (rng.integers(0, 256, (12, 28, 28), np.uint8),
               rng.integers(0, 256, (5, 28, 28), np.uint8))
TRAIN_LABELS, TEST_LABELS = (np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 0, 8], np.uint8),
                             np.array([9, 7, 9, 3, 2], np.uint8))


def idx(array):
    return (bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            + array.tobytes())


def mnist(**changed):
    """{file name without ending: bytes} of a small set."""
    arrays = dict(zip(("train_images", "train_labels", "t10k_images", "t10k_labels"),
                      (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)))
    return {stem: idx((arrays | changed)["_".join(stem.split("-")[:2])]) for stem in data.IDX}


def agrees(dataset, images, labels):
    """The data set holds these 28 x 28 pictures, padded, each with its label, sorted by label."""
    order = np.argsort(labels, kind="stable")
    padded = np.zeros((len(images), 1, 32, 32), np.uint8)
    padded[:, 0, 2:30, 2:30] = images
    assert (np.array_equal(dataset.images.numpy(), padded[order])
            and dataset.labels.tolist() == labels[order].tolist())


@pytest.mark.parametrize("name", ("mnist", "fashion-mnist"))
@pytest.mark.parametrize("form", ("raw", "gz", "gz at level 1", "raw called gz", "dotted",
                                  "in root"))
def test_idx_files_that_are_there_are_used_whatever_their_compression(root, name, form):
    place = root if form == "in root" else root / name
    for stem, content in mnist().items():
        stem = stem.replace("-idx", ".idx") if form == "dotted" else stem
        if form.startswith("gz"):
            content = gzip.compress(content, 1 if "1" in form else 9)
        folder(place, {stem + (".gz" if "gz" in form else ""): content})
    train, test = data.load(name, root), data.load(name, root, split="test")
    agrees(train, TRAIN, TRAIN_LABELS)
    agrees(test, TEST, TEST_LABELS)
    assert (train.classes == (data.DIGITS if name == "mnist" else data.FASHION)
            and train.shape == (1, 32, 32))


def test_mnist_shrinks_by_boxes_and_keeps_classes(root):
    folder(root / "mnist", mnist())
    small = data.load("mnist", root, 16, ["5", "1"])
    # in the set's own order
    assert small.classes == ["1", "5"] and small.labels.tolist() == [0, 0, 1, 1]
    padded = np.pad(TRAIN[[1, 3, 4, 8]], ((0, 0), (2, 2), (2, 2))).astype(float)
    mean = padded.reshape(4, 16, 2, 16, 2).mean((2, 4))
    # BOX: the mean of 2 x 2, rounded along each axis
    assert np.abs(small.images[:, 0].numpy() - mean).max() <= 1
    fails("mnist", root, classes=["ten"], match="ten.*0, 1, 2")


@pytest.mark.parametrize("what, content, fault", (
    ("train_images", b"", "not an IDX"), ("train_images", b"\0\0\x08", "not an IDX"),
    ("t10k_labels", b"<html>404</html>", "not an IDX"),
    ("train_images", idx(TRAIN)[:-1], "not an IDX"),
    ("train_images", idx(TRAIN) + b"\0", "not an IDX"),
    ("train_images", b"\0\0\x0d\3" + idx(TRAIN)[4:], "not an IDX"),
    ("train_images", idx(TRAIN[:, :27]), "not an IDX"),
    ("train_labels", idx(TRAIN), "not an IDX"),
    ("train_labels", idx(TRAIN_LABELS[:0]), "not an IDX"),
    ("t10k_images", gzip.compress(idx(TEST))[:-20], "not an IDX"),
    ("t10k_images", b"\x1f\x8b" + b"x" * 50, "not an IDX"),
    ("train_labels", idx(TRAIN_LABELS[:-1]), "do not belong"),
    ("t10k_images", idx(TEST[:-2]), "do not belong"),
    ("train_labels", idx(TRAIN_LABELS + 5), "do not belong"),
))
def test_damaged_idx_files_are_told(root, what, content, fault):
    stem = next(s for s in data.IDX if s.startswith(what.replace("_", "-")))
    folder(root / "mnist", mnist() | {stem: content})
    fails("mnist", root, match=f"(?s)mnist.*{fault}.*delete")
    assert everything(root / "cached") == []


# ----------------------------------------------------------------------------------------- CIFAR-10
# a record: the label, then the planes of R, G and B
PHOTOS, KINDS = (rng.integers(0, 256, (12, 3, 32, 32), np.uint8),
                 np.array([6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 3, 0], np.uint8))
BATCHES = {
    f"cifar-10-batches-bin/{name}.bin": b"".join(
        bytes([KINDS[i]]) + PHOTOS[i].tobytes() for i in (2 * n, 2 * n + 1))
    for n, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))}


@pytest.mark.parametrize("form", ("archive", "archive, not gzip", "files", "files in root"))
def test_cifar10_archive_or_files(root, form):
    if form == "files in root":
        folder(root, {name.split("/")[1]: content for name, content in BATCHES.items()})
    elif form == "files":
        folder(root / "cifar10", BATCHES)
    else:
        (root / "cifar10").mkdir(parents=True)
        files = {"cifar-10-batches-bin/readme.html": b"<p>", **dict(reversed(BATCHES.items())),
                 "../evil.bin": b"x"}
        made = archive(root / ("a.tar" if "not" in form else "a.tar.gz"), files)
        made.rename(root / "cifar10" / "cifar-10-binary.tar.gz")
    train, test = data.load("cifar10", root), data.load("cifar10", root, split="test")
    order = np.argsort(KINDS[:10], kind="stable")
    assert (np.array_equal(train.images.numpy(), PHOTOS[:10][order])
            and train.labels.tolist() == KINDS[:10][order].tolist())
    assert np.array_equal(test.images.numpy(), PHOTOS[[11, 10]]) and test.labels.tolist() == [0, 3]
    assert train.classes[1] == "automobile" and train.shape == (3, 32, 32)
    bird = data.load("cifar10", root, 8, ["bird"])
    mean = PHOTOS[6].reshape(3, 8, 4, 8, 4).astype(float).mean((2, 4))
    assert len(bird) == 1 and np.abs(bird.images[0].numpy() - mean).max() <= 1
    assert "evil.bin" not in " ".join(everything(root.parent))


@pytest.mark.parametrize("damage", ("missing", "link", "cut record", "label", "cut", "empty",
                                    "no archive"))
def test_damaged_cifar10_is_told(root, damage):
    files = dict(BATCHES)
    name = "cifar-10-batches-bin/data_batch_4.bin"
    if damage == "link":
        files[name] = None
    elif damage == "missing":
        del files[name]
    elif damage == "cut record":
        files[name] = files[name][:-1]
    elif damage == "label":
        files[name] = b"\x0a" + files[name][1:]
    root.mkdir()
    content = archive(root / "a.tar.gz", files).read_bytes()
    content = {"cut": content[:len(content) // 2], "empty": b"",
               "no archive": b"404" * 99}.get(damage, content)
    folder(root, {"cifar-10-binary.tar.gz": content})
    fails("cifar10", root, match=r"cifar-10-binary\.tar\.gz")
    (root / "cifar-10-binary.tar.gz").unlink()
    if damage in ("missing", "cut record", "label"):
        folder(root, files)
        fails("cifar10", root, match="cifar-10-batches-bin")


# ----------------------------------------------------------------------------------------- fetching
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's {path: bytes}; the first folder of the path says how: /good/, /cut/,
    /corrupted/, /missing/, ..."""
    def do_GET(self):
        self.server.asked.append(self.path)
        _, how, file = self.path.split("/")
        content = self.server.files[file]
        if how == "garbage":
            self.wfile.write(b"\xff\xfe\r\n\r\n")
            return
        if how == "dropped":
            self.close_connection = True
            return
        if how == "corrupted":
            content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        self.send_response(404 if how == "missing" else 200)
        if not how.startswith("unknown"):  # a length that nobody tells is legal
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if how in ("cut", "unknown-cut") else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of the small MNIST on this machine. server.sources(*hows): fetch from there in
    these ways, in turn."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01),
                         daemon=True).start()
        s.asked, s.files = [], {f"{stem}.gz": gzip.compress(content)
                                for stem, content in mnist().items()}

        def sources(*hows, what="packed"):
            digests = {
                n[:-3]: hashlib.md5(c if what == "packed" else gzip.decompress(c)).hexdigest()
                for n, c in s.files.items()}
            addresses = [how if "://" in how else f"http://127.0.0.1:{s.server_port}/{how}/"
                         for how in hows]
            monkeypatch.setitem(data.SOURCES, "mnist", (addresses, digests, what))
        s.sources = sources
        yield s
        s.shutdown()


BAD = ("missing", "cut", "corrupted", "garbage", "dropped", "http://127.0.0.1:1/")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ("packed", "unpacked"))
def test_the_second_address_serves_where_the_first_fails(server, root, bad, what):
    server.sources(bad, "good", "never", what=what)
    agrees(data.load("mnist", root), TRAIN, TRAIN_LABELS)
    # under their own names, and nothing else
    assert everything(root / "mnist") == sorted(server.files)
    assert all((root / "mnist" / n).read_bytes() == c for n, c in server.files.items())
    expected = [f"/{how}/{stem}.gz" for stem in data.IDX for how in (bad, "good")
                if "://" not in how]
    assert server.asked == expected
    agrees(data.load("mnist", root, split="test"), TEST, TEST_LABELS)
    assert server.asked == expected  # nothing is fetched twice


@pytest.mark.parametrize("bad", BAD)
def test_nothing_is_left_where_all_addresses_fail(server, root, bad):
    server.sources("missing", bad)
    fails("mnist", root, match=f"could not fetch train-images-idx3-ubyte.gz.*/missing/.*{bad}.*"
                               "put the file into")
    assert everything(root) == ["mnist"]
    if bad == "cut":
        fails("mnist", root, match=r"cut at \d+ of \d+ bytes")


def test_what_is_there_is_neither_fetched_nor_digested(server, root):
    server.sources("good", "never")
    stems = list(data.IDX)
    # another digest, raw
    folder(root / "mnist", {stems[0]: mnist(train_images=255 - TRAIN)[stems[0]]})
    folder(root, {f"{stems[3]}.gz": gzip.compress(mnist()[stems[3]], 1)})
    agrees(data.load("mnist", root), 255 - TRAIN, TRAIN_LABELS)
    assert server.asked == [f"/good/{stems[1]}.gz", f"/good/{stems[2]}.gz"]


def test_a_digest_of_what_is_inside_allows_another_packing(server, root):
    server.sources("good", what="unpacked")
    server.files = {n: gzip.compress(gzip.decompress(c), 1, mtime=1)
                    for n, c in server.files.items()}
    agrees(data.load("mnist", root), TRAIN, TRAIN_LABELS)


def test_an_answer_of_unknown_length_is_taken_if_whole(server, root):
    server.sources("unknown-cut", "unknown")
    agrees(data.load("mnist", root), TRAIN, TRAIN_LABELS)


def test_cifar10_is_fetched(server, root, monkeypatch):
    content = archive(root.parent / "a.tar.gz", BATCHES).read_bytes()
    server.files = {"cifar-10-binary.tar.gz": content}
    good = [f"http://127.0.0.1:{server.server_port}/{how}/" for how in ("corrupted", "good")]
    monkeypatch.setitem(data.SOURCES, "cifar10", (
        good, {"cifar-10-binary": hashlib.sha256(content).hexdigest()}, "packed"))
    assert (len(data.load("cifar10", root)) == 10
            and everything(root / "cifar10") == ["cifar-10-binary.tar.gz"])


def test_the_addresses_and_digests_are_well_formed():
    for name, (addresses, digests, what) in data.SOURCES.items():
        assert (what in ("packed", "unpacked") and len(addresses) >= 2
                and len(set(digests.values())) == len(digests))
        assert all(re.fullmatch(r"https?://[^ ]+/", a) for a in addresses)
        # MD5 or SHA-256, not a digit more
        assert all(re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", d) for d in digests.values())


# ------------------------------------------------------------------------------------ picture modes
RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17  # 0..255, all different
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], -1)


def test_grey_and_colour_are_kept_as_they_are(tmp_path):
    assert np.array_equal(pixels(tmp_path, encoded(RAMP)), RAMP[None])
    assert np.array_equal(pixels(tmp_path, encoded(COLOUR)), COLOUR.transpose(2, 0, 1))
    assert np.array_equal(pixels(tmp_path, encoded(COLOUR, "tiff"), name="a.TIF"),
                          COLOUR.transpose(2, 0, 1))
    assert np.array_equal(pixels(tmp_path, encoded(RAMP > 100)), (RAMP > 100)[None] * 255)  # mode 1
    assert np.abs(pixels(tmp_path, encoded(COLOUR, "jpeg", quality=100, subsampling=0),
                         name="a.jpg")
                  - COLOUR.transpose(2, 0, 1)).max() <= 5  # JPEG's own rounding


def test_alpha_lies_over_white(tmp_path):
    alpha = np.array([[0, 255, 128, 64]] * 4, np.uint8)
    over = RAMP * (alpha / 255) + 255 * (1 - alpha / 255)
    grey = pixels(tmp_path, encoded(
        Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(alpha)))))
    assert grey.shape == (1, 4, 4) and np.abs(grey - over).max() <= 1
    colour = pixels(tmp_path, encoded(np.concatenate([COLOUR, alpha[..., None]], -1)))
    mixed = COLOUR * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]
    assert colour.shape == (3, 4, 4) and np.abs(colour - mixed.transpose(2, 0, 1)).max() <= 1
    # its two ends are exact
    assert (colour[:, :, 0] == 255).all() and np.array_equal(colour[:, :, 1], COLOUR[:, 1].T)


def test_palettes_and_transparent_colours(tmp_path):
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 3)
    picture = Image.frombytes("P", (4, 4), picture.tobytes())
    picture.putpalette([255, 0, 0, 0, 200, 0, 10, 20, 30])
    colours = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30]])[np.arange(16).reshape(4, 4) % 3]
    assert np.array_equal(pixels(tmp_path, encoded(picture)), colours.transpose(2, 0, 1))
    colours[np.arange(16).reshape(4, 4) % 3 == 1] = 255
    assert np.array_equal(pixels(tmp_path, encoded(picture, transparency=1)),
                          colours.transpose(2, 0, 1))
    assert np.array_equal(pixels(tmp_path, encoded(picture, "gif", transparency=1), name="a.gif"),
                          colours.transpose(2, 0, 1))
    grey = pixels(tmp_path, encoded(RAMP, transparency=17))
    assert np.array_equal(grey, np.where(RAMP == 17, 255, RAMP)[None])


@pytest.mark.parametrize("form, name", (("png", "a.png"), ("tiff", "a.tiff"), ("ppm", "a.pgm")))
def test_sixteen_bits_become_eight(tmp_path, form, name):
    deep = RAMP.astype(np.uint16) * 257
    assert np.array_equal(pixels(tmp_path, encoded(deep, form), name=name), RAMP[None])
    dark = np.full((4, 4), 255, np.uint16)  # nearly black, although it would fit into a byte
    assert np.array_equal(pixels(tmp_path, encoded(dark, form), name=name), np.ones((1, 4, 4)))


def test_deep_tiff_files(tmp_path):
    swapped = Image.frombytes("I;16B", (4, 4), (RAMP.astype(">u2") * 257).tobytes())
    assert np.array_equal(pixels(tmp_path, encoded(swapped, "tiff"), name="a.tif"), RAMP[None])
    assert np.array_equal(pixels(tmp_path, encoded(RAMP.astype(np.int32) * 257, "tiff"),
                                 name="a.tif"), RAMP[None])
    assert np.array_equal(pixels(tmp_path, encoded(RAMP.astype(np.float32), "tiff"),
                                 name="a.tif"), RAMP[None])
    assert np.array_equal(pixels(tmp_path, encoded((RAMP / 255).astype(np.float32), "tiff"),
                                 name="a.tif"), RAMP[None])


def test_cmyk(tmp_path):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:, :, 0] = 255  # cyan alone: no red
    for form, name in (("jpeg", "a.jpg"), ("tiff", "a.tif")):
        result = pixels(tmp_path, encoded(Image.frombytes("CMYK", (8, 8), ink.tobytes()), form),
                        name=name)
        assert np.abs(result - np.array([0, 255, 255])[:, None, None]).max() <= 3


# EXIF: where the stored row 0 and column 0 are in the upright picture u
STORED = {1: lambda u: u, 2: lambda u: u[:, ::-1], 3: lambda u: u[::-1, ::-1],
          4: lambda u: u[::-1], 5: lambda u: u.T, 6: lambda u: u[:, ::-1].T,
          7: lambda u: u[::-1, ::-1].T, 8: lambda u: u[::-1].T}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_turns_pictures_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(tmp_path, encoded(STORED[orientation](RAMP), exif=exif)),
                          RAMP[None])


def test_the_centre_square_is_kept(tmp_path):
    wide = np.arange(44, dtype=np.uint8).reshape(4, 11)
    assert np.array_equal(pixels(tmp_path, encoded(wide), 4), wide[None, :, 3:7])
    assert np.array_equal(pixels(tmp_path, encoded(wide.T), 4), wide.T[None, 3:7])
    tall = rng.integers(0, 256, (12, 8, 3), np.uint8)
    mean = tall[2:10].reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(pixels(tmp_path, encoded(tall), 4) - mean).max() <= 1
    assert np.array_equal(pixels(tmp_path, encoded(9), 32), np.full((1, 32, 32), 9))  # grown


def test_the_size_is_the_pictures_own_if_they_agree(tmp_path, root):
    def shape(*sizes, **kwargs):
        source = folder(tmp_path / str(sizes), {
            f"{i}.png": encoded(np.zeros(s, np.uint8)) for i, s in enumerate(sizes)})
        return data.load(source, root, **kwargs).shape
    assert shape((5, 5), (5, 5)) == (1, 5, 5) and shape((5, 5), (5, 5), size=7) == (1, 7, 7)
    assert shape((5, 5), (6, 6)) == shape((5, 6), (5, 6)) == (1, 64, 64)
    fails(folder(tmp_path / "tiny", {"a.png": encoded(np.zeros((3, 3), np.uint8))}), root,
          match="too small.*--size")
    for size in (0, 3, -1):
        fails("digits", root, size, match="too small")


def test_one_colour_picture_makes_the_set_coloured(tmp_path, root):
    source = folder(tmp_path / "s", {"a.png": encoded(RAMP), "b.png": encoded(COLOUR),
                                     "c.png": encoded(RAMP)})
    images = data.load(source, root).images
    assert images.shape[1:] == (3, 4, 4) and all(
        (i[0] == i[2]).all() or (i[0] == 255 - i[2]).all() for i in images)


# ------------------------------------------------------------------------------- classes and splits
TREE = {f"{split}/{kind}/{n}.png": encoded(100 * (split == "test") + 10 * k + n)
        for split in ("train", "test") for k, kind in enumerate(("cat", "dog", "eel"))
        for n in range(3)}


@pytest.mark.parametrize("wrap", ("", "photos/", "a/b/"))
@pytest.mark.parametrize("end", ("", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".ZIP"))
def test_folders_and_archives(tmp_path, root, wrap, end):
    files = {wrap + name: content for name, content in reversed(TREE.items())}
    files |= {wrap + "train/readme.txt": b"hello", "__MACOSX/0.png": b"junk",
              ".hidden/0.png": encoded(1), wrap + "train/cat/.0.png": b"junk"}
    if end.islower():
        source = archive(tmp_path / ("my.pictures" + end), files)
    elif end:
        source = archive(tmp_path / "a.zip", files).rename(tmp_path / "a.ZIP")
    else:
        source = folder(tmp_path / "my.pictures", files)
    train, test = data.load(str(source), root), data.load(str(source), root, split="test")
    assert train.classes == test.classes == ["cat", "dog", "eel"] and train.shape == (1, 4, 4)
    assert sorted(zip(values(train), train.labels.tolist())) == [
        (10 * k + n, k) for k in range(3) for n in range(3)]
    assert sorted(zip(values(test), test.labels.tolist())) == [
        (100 + 10 * k + n, k) for k in range(3) for n in range(3)]
    # one folder and its five files
    assert train.labels.dtype == torch.int64 and len(everything(root / "cached")) == 6


def test_chosen_classes_are_renumbered(tmp_path, root):
    source = folder(tmp_path / "s", TREE)
    for classes, expected in ((["dog"], [(10, 0), (11, 0), (12, 0)]),
                              (["eel", "cat"], [(0, 0), (1, 0), (2, 0), (20, 1), (21, 1), (22, 1)]),
                              (["dog", "eel", "dog"],
                               [(10, 0), (11, 0), (12, 0), (20, 1), (21, 1), (22, 1)])):
        part = data.load(source, root, classes=classes)
        assert (part.classes == sorted(set(classes))
                and sorted(zip(values(part), part.labels.tolist())) == expected)
        x, label = part.batch(torch.arange(len(part)).flip(0))
        seen = (x[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()
        assert sorted(zip(seen, label.tolist())) == expected and seen == values(part)[::-1]
    fails(source, root, classes=["cat", "cow"], match="cow.*cat, dog, eel")
    fails(folder(tmp_path / "flat", {"a.png": encoded(1)}), root, classes=["cat"],
          match="cat.*no classes")
    only = folder(tmp_path / "only", {"train/cat/a.png": encoded(1), "test/dog/a.png": encoded(2)})
    fails(only, root, classes=["dog"], match="dog.*no such class, but cat")


def test_a_tenth_is_held_out_where_there_is_no_test_split(tmp_path):
    for top in ("", "train/"):
        source = folder(tmp_path / f"s{len(top)}", {
            f"{top}{'ab'[i % 2]}/{i}.png": encoded(i) for i in range(40)})
        train, test = (data.load(source, tmp_path / "1"),
                       data.load(source, tmp_path / "1", split="test"))
        assert ((len(train), len(test)) == (36, 4)
                and sorted(values(train) + values(test)) == list(range(40)))
        assert all(v % 2 == label for part in (train, test)
                   for v, label in zip(values(part), part.labels.tolist()))
        assert values(data.load(source, tmp_path / "2", split="test")) == values(test)
        assert (sorted(values(data.load(source, tmp_path / "1", size=8, split="test")))
                == sorted(values(test)))
    two = folder(tmp_path / "two", {"1.png": encoded(1), "2.png": encoded(2)})
    assert (len(data.load(two, tmp_path / "1"))
            == len(data.load(two, tmp_path / "1", split="test")) == 1)
    one = folder(tmp_path / "one", {"1.png": encoded(1)})
    assert len(data.load(one, tmp_path / "1")) == 1
    fails(one, tmp_path / "1", split="test", match="no pictures to test")
    fails(folder(tmp_path / "test only", {"test/1.png": encoded(1)}), tmp_path / "1",
          match="no pictures to train")
    fails(one, tmp_path / "1", split="valid", match="valid.*train or test")


def test_pictures_without_a_folder_have_no_label(tmp_path, root):
    names = "1.png", "2.png", "test/3.png", "test/a/4.png", "deep/down/b/5.png"
    source = folder(tmp_path / "s", {name: encoded(int(name[-5])) for name in names})
    train, test = data.load(source, root), data.load(source, root, split="test")
    assert train.classes == test.classes == ["b"]
    assert sorted(zip(values(train), train.labels.tolist())) == [(1, -1), (2, -1), (5, 0)]
    # 4 is of a class that is not trained
    assert sorted(zip(values(test), test.labels.tolist())) == [(3, -1)]
    assert train.left_out == {"of a in test, which train has not": 1}
    assert sorted(zip(values(part := data.load(source, root, classes=["b"])),
                      part.labels.tolist())) == [(5, 0)]
    flat = data.load(folder(tmp_path / "flat", {"1.png": encoded(1)}), root)
    assert flat.classes == [] and flat.labels.tolist() == [-1]


def test_nothing_to_read_is_told(tmp_path, root):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", root, match="empty.*no picture")
    fails(folder(tmp_path / "text", {"a.txt": b"hello", "b.png": b"hello"}), root,
          match="text.*no picture")
    fails(archive(tmp_path / "a.zip", {}), root, match="a.zip.*no picture")
    fails(archive(tmp_path / "a.tar", {}), root, match="a.tar.*no picture")
    fails(tmp_path / "imagenet", root, match="imagenet: no such.*digits.*mnist")
    fails(folder(tmp_path, {"a.rar": b"x"}) / "a.rar", root, match="a.rar.*not a folder")
    assert everything(root / "cached") == []
    (tmp_path / "file").write_bytes(b"")
    # a --data-root that is none
    fails(folder(tmp_path / "s", TREE), tmp_path / "file", match="file")


# ------------------------------------------------------------------------------------ hostile input
@pytest.mark.parametrize("end", (".zip", ".tar", ".tar.xz"))
def test_nothing_leaves_an_archive(tmp_path, root, end, capsys):
    source = archive(tmp_path / ("s" + end), {
        "../evil.png": encoded(1), "/absolute/evil.png": encoded(2),
        "ok/../../3.png": encoded(3), "ok/4.png": encoded(4)})
    before = everything(tmp_path)
    train = data.load(source, root, seed=0)
    assert sorted(values(train) + values(data.load(source, root, split="test"))) == [1, 2, 3, 4]
    assert train.classes == ["absolute", "ok"] and capsys.readouterr().err == ""
    assert [f for f in everything(tmp_path) if not f.startswith("root")] == before
    assert all(
        re.fullmatch(r"cached(/s-\w+(/(images|labels|splits|hashes)\.npy|/about\.json)?)?", f)
        for f in everything(root))


def test_links_in_archives_are_not_followed(tmp_path, root, capsys):
    source = archive(tmp_path / "s.tar", {"a.png": encoded(1), "link.png": None})
    assert values(data.load(source, root)) == [1]
    assert data.load(source, root).left_out == {"empty or a link": 1}


def test_odd_files_in_folders(tmp_path, root, capsys):
    folder(tmp_path / "elsewhere", {"a.png": encoded(7)})
    source = folder(tmp_path / "s", {"1.png": encoded(1), "empty.png": b""})
    try:
        (source / "good.png").symlink_to(tmp_path / "elsewhere" / "a.png")
        (source / "dangling.png").symlink_to(tmp_path / "gone.png")
        os.mkfifo(source / "pipe.png")  # to read it would take forever
    except (AttributeError, OSError):
        pytest.skip("this system has no links or pipes")
    assert sorted(values(data.load(source, root))
                  + values(data.load(source, root, split="test"))) == [1, 7]
    assert data.load(source, root).left_out == {"empty or a link": 3}


def bomb(width, rows):
    """A PNG that says it has width x width pixels of one bit, and has that many rows of them,
    black."""
    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", width, width, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((1 + width // 8) * rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("end", ("", ".zip", ".tar.gz"))
def test_unreadable_pictures_are_left_out_and_told_in_one_line(tmp_path, root, end, capsys,
                                                               monkeypatch):
    whole = encoded(rng.integers(0, 256, (4, 4, 3), np.uint8))
    noise = encoded(rng.integers(0, 256, (64, 64), np.uint8), "jpeg")
    big = encoded(rng.integers(0, 256, (40, 40, 3), np.uint8), "bmp")
    big += bytes(20_000)
    monkeypatch.setattr(data, "LARGEST", len(big) - 1)
    files = {"b/text.png": b"hello", "b/cut.png": whole[:60], "b/cut.jpg": noise[:700],
             "b/bomb.png": bomb(80_000, 9), "b/whole.png": bomb(14_000, 14_000), "b/big.bmp": big,
             "b/empty.gif": b"",
             "a/1.png": encoded(1), "a/2.png": encoded(2), "c/3.png": encoded(3)}
    source = archive(tmp_path / ("s" + end), files) if end else folder(tmp_path / "s", files)
    train, test = data.load(source, root), data.load(source, root, split="test")
    # no class of nothing
    assert train.classes == ["a", "c"] and sorted(values(train) + values(test)) == [1, 2, 3]
    first = "b/cut.jpg" if not end else "b/text.png"
    assert train.left_out == {"damaged": 3, "first": first, "of 6400 megapixels": 1,
                              "of 196 megapixels": 1, "of more than 0 MiB": 1,
                              "empty or a link": 1}
    assert (data.told(train.left_out).endswith(f"the first is {first}")
            and capsys.readouterr().err == "")


def test_postscript_is_not_run(tmp_path, root, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript",
                        lambda *a, **k: pytest.fail("a program was run"))
    eps = encoded(np.zeros((4, 4, 3), np.uint8), "eps")
    source = folder(tmp_path / "s", {"a.png": encoded(1), "b.png": eps, "c.eps": eps})
    assert values(data.load(source, root)) == [1]
    with pytest.raises(ValueError, match="b.png is not a picture"):
        data.read_pictures([source / "b.png"], (1, 4, 4))


@pytest.mark.parametrize("end", (".zip", ".tar", ".tar.gz", ".tar.xz"))
def test_a_cut_archive_is_told_wherever_it_is_cut(tmp_path, root, end):
    noise = {f"{i}.png": encoded(rng.integers(0, 256, (8, 8), np.uint8)) for i in range(8)}
    whole = archive(tmp_path / ("whole" + end), noise).read_bytes()
    cut = tmp_path / ("cut" + end)
    heads = [1024 * i for i in range(1, 8)] if end == ".tar" else []  # just before a header
    for length in (0, 1, 2, 5, 11, *np.linspace(20, len(whole) - 1, 30).astype(int), *heads):
        cut.write_bytes(whole[:length])
        try:
            found = len(data.load(cut, root)) + len(data.load(cut, root, split="test"))
        except ValueError as error:
            assert re.fullmatch("--data .*cut.*(damaged|no picture).*", str(error))
        else:
            assert found == 8 and length > 0.8 * len(whole)  # nothing but the end mark is missing
    for content in (b"x" * 5000, b"<html></html>"):
        cut.write_bytes(content)
        fails(cut, root, match="damaged")


def test_a_damaged_header_is_not_the_end_of_an_archive(tmp_path, root):
    source = archive(tmp_path / "s.tar", {f"{i}.png": encoded(i) for i in range(8)})
    content = bytearray(source.read_bytes())
    content[3 * 1024 + 20] ^= 255
    source.write_bytes(content)
    fails(source, root, match="damaged")


def test_a_damaged_zip_entry_costs_one_picture(tmp_path, root, capsys):
    source = archive(tmp_path / "s.zip", {f"{i}.png": encoded(i) for i in range(3)})
    content = bytearray(source.read_bytes())
    content[40] ^= 255  # in the first entry's data
    source.write_bytes(content)
    assert sorted(values(data.load(source, root))
                  + values(data.load(source, root, split="test"))) == [1, 2]
    assert data.load(source, root).left_out == {"damaged": 1, "first": "0.png"}


# ---------------------------------------------------------------------------------------- the cache
def times(root):
    return {p: p.stat().st_mtime_ns for p in (root / "cached").rglob("*")}


def test_the_cache_is_made_once(tmp_path, root, monkeypatch):
    source = folder(tmp_path / "s", TREE)
    first = data.load(source, root)
    digits = data._draw_digits
    monkeypatch.setattr(data, "_draw_digits", lambda size, seed: digits(size, seed, 100))
    data.load("digits", root, 8, seed=1)
    before = times(root)
    monkeypatch.setattr(data, "_draw_digits", None)
    monkeypatch.setattr(data, "_pictures", None)
    assert torch.equal(data.load(source, root).images, first.images)
    data.load(source, root, classes=["dog"], split="test")  # other choices of the same set
    assert len(data.load("digits", root, 8, split="test", seed=1)) == 10
    assert times(root) == before and len(before) == 12  # two folders of five files
    with pytest.raises(TypeError):
        data.load("digits", root, 8, seed=2)  # another set


@pytest.mark.parametrize("end", ("", ".zip"))
def test_the_cache_follows_its_source(tmp_path, root, end):
    def write(files):
        return archive(tmp_path / "s.zip", files) if end else folder(tmp_path / "s", files)
    source = write({"a/1.png": encoded(1)})
    stat = (source if end else source / "a" / "1.png").stat()
    assert values(data.load(source, root)) == [1]
    write({"a/1.png": encoded(2)})
    changed = source if end else source / "a" / "1.png"
    assert changed.stat().st_size == stat.st_size
    # as long, a microsecond later
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))
    assert values(data.load(source, root)) == [2]
    assert values(data.load(write({"a/1.png": encoded(2), "a/3.png": encoded(3)}), root)) in (
        [2], [3])  # one is held out
    if not end:
        (source / "a").rename(source / "b")
        assert data.load(source, root).classes == ["b"]


def test_official_files_that_change_are_read_again(root):
    folder(root / "mnist", mnist())
    data.load("mnist", root)
    folder(root / "mnist", {data.IDX[0]: mnist(train_images=255 - TRAIN)[data.IDX[0]]})
    os.utime(root / "mnist" / data.IDX[0], ns=(1, 1))
    agrees(data.load("mnist", root), 255 - TRAIN, TRAIN_LABELS)


def test_two_that_make_one_cache_at_once_do_not_disturb_each_other(tmp_path, root, monkeypatch):
    source, read, inner = folder(tmp_path / "s", TREE), data._read_path, []

    # the first has read all and stored nothing when a second one starts, and ends before it
    def slow(*args):
        monkeypatch.setattr(data, "_read_path", read)
        made = read(*args)
        inner.append(data.load(source, root))
        return made
    monkeypatch.setattr(data, "_read_path", slow)
    outer = data.load(source, root)
    assert (torch.equal(outer.images, inner[0].images)
            and outer.labels.tolist() == inner[0].labels.tolist())
    assert len(everything(root / "cached")) == 6


def test_two_processes_at_once(tmp_path, root):
    source = folder(tmp_path / "s", {
        f"{i}.png": encoded(rng.integers(0, 256, (32, 32), np.uint8)) for i in range(100)})
    script = ("import sys, hashlib; from common import data; print('ready', flush=True); "
              "sys.stdin.readline(); d = data.load(sys.argv[1], sys.argv[2]); "
              "print(hashlib.md5(d.images.numpy().tobytes()).hexdigest())")
    runs = [subprocess.Popen([sys.executable, "-c", script, source, root], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    answers = [run.communicate(timeout=60) for run in runs]
    expected = hashlib.md5(data.load(source, root).images.numpy().tobytes()).hexdigest() + "\n"
    assert answers == [(expected, "")] * 2 and len(everything(root / "cached")) == 6


def test_a_failure_leaves_no_cache(tmp_path, root, monkeypatch):
    source = folder(tmp_path / "s", TREE)

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    fails(source, root, match="No space left")
    assert everything(root / "cached") == []
    monkeypatch.undo()
    assert len(data.load(source, root)) == 9


def test_the_left_over_of_a_killed_process_is_no_cache(tmp_path, root):
    source = folder(tmp_path / "s", TREE)
    data.load(source, root)
    (made,) = (root / "cached").iterdir()
    (made / "about.json").rename(made / "labels.npy")
    # half written, by one that had this process's number
    made.rename(made.with_name(f".{os.getpid()}-{made.name}"))
    assert len(data.load(source, root)) == 9


def test_a_set_is_mapped_not_read(tmp_path, root):
    train = data.load(folder(tmp_path / "s", TREE), root, classes=["cat", "dog"])
    (file,) = (root / "cached").glob("*/images.npy")
    maps = f"/proc/{os.getpid()}/maps"
    if os.path.exists(maps):
        with open(maps) as f:
            assert str(file) in f.read()
    before = os.stat(file).st_size
    with open(file, "r+b") as f:  # a map sees what is written to its file
        f.seek(-18 * 16, 2)
        f.write(b"\7" * 18 * 16)
    assert os.stat(file).st_size == before and (train.images == 7).all()


def test_a_set_larger_than_memory(tmp_path, root):
    """Four pictures of 2^19 x 2^19: a terabyte, in a file with a hole for all of it but the last
    byte."""
    source = folder(tmp_path / "s", {f"train/{i}.png": encoded(i) for i in range(4)}
                    | {"test/a.png": encoded(9)})
    data.load(source, root)
    (file,) = (root / "cached").glob("*/images.npy")
    try:
        with open(file, "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr="|u1", fortran_order=False, shape=(5, 1, 1 << 19, 1 << 19)))
            f.truncate(f.tell() + (5 << 38))
            f.seek(-(1 << 38) - 1, 2)
            f.write(b"\5")
        kept = json.loads((file.parent / "about.json").read_text())
        kept["sums"]["images.npy"] = data._sum(file)
        (file.parent / "about.json").write_text(json.dumps(kept))
    except OSError:
        pytest.skip("this file system has no files of a terabyte with holes")
    try:
        images = data.load(source, root).images
        assert (images.shape == (4, 1, 1 << 19, 1 << 19) and images[3, 0, -1, -1] == 5
                and images[2, 0, 5, 5] == 0)
    finally:
        file.unlink()


def cut(file, content):
    return content[:len(content) // 2]


def changed(file, content):
    middle = len(content) - 9
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


def another_s(file, content):
    """Of the same length, with the values in another order."""
    return (content[:128] + content[128:][::-1] if file.suffix == ".npy"
            else content.replace(b"cat", b"cow"))


DAMAGE = {"cut": cut, "changed": changed, "empty": lambda *_: b"", "another's": another_s,
          "text": lambda *_: b"[]", "an empty table": lambda *_: b"{}"}


@pytest.mark.parametrize("name", ("images.npy", "labels.npy", "splits.npy", "hashes.npy",
                                  "captions.npy", "about.json"))
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_is_told_and_made_anew(name, how, tmp_path, root, capsys):
    texts = {f"train/{kind}/{i}.txt": f"a {kind} {i}".encode()
             for kind in ("cat", "dog") for i in range(5)}
    tree = {f"{split}/{kind}/{i}.png": encoded(rng.integers(0, 256, (8, 8), np.uint8))
            for split in ("train", "test") for kind in ("cat", "dog") for i in range(5)}
    source = folder(tmp_path / "s", tree | texts)
    before = [data.load(source, root, split=split) for split in ("train", "test")]
    (file,) = (root / "cached").glob(f"*/{name}")
    content = file.read_bytes()
    kept = [(each.images.clone(), each.labels.clone(), each.captions.clone()) for each in before]
    damaged = DAMAGE[how](file, content)
    assert damaged != content
    del before
    file.unlink()  # what is mapped is not changed
    file.write_bytes(damaged)
    capsys.readouterr()
    for again in range(2):
        for split, (images, labels, captions) in zip(("train", "test"), kept):
            there = data.load(source, root, split=split)
            assert torch.equal(there.images, images) and torch.equal(there.labels, labels)
            assert torch.equal(there.captions, captions) and there.classes == ["cat", "dog"]
        told = capsys.readouterr().err
        assert told.count("is damaged: the data are read once more") == (again == 0)


def test_a_long_file_s_sum_reads_its_ends_and_parts_of_it(tmp_path):
    """16 MiB at most; all of a file of that length."""
    path = tmp_path / "a"
    path.write_bytes(bytes(300 * data.BLOCK + 5))
    whole = data._sum(path)
    for place, seen in ((0, True), (300 * data.BLOCK + 4, True), (-1, True)):
        with open(path, "r+b") as file:
            file.seek(place) if place >= 0 else file.seek(0, 2)
            file.write(b"x")
        assert (data._sum(path) != whole) == seen
        whole = data._sum(path)
    short = tmp_path / "b"
    short.write_bytes(bytes(40 * data.BLOCK))
    sums = set()
    for place in range(0, 40 * data.BLOCK, data.BLOCK // 2):
        with open(short, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        sums.add(data._sum(short))
    assert len(sums) == 80


# ------------------------------------------------------------------------------------ hostile files
def test_a_pipe_is_no_data(tmp_path, root):
    """Which would be waited for."""
    for name in ("p", "p.zip", "p.tar.gz"):
        os.mkfifo(tmp_path / name)
        fails(tmp_path / name, root, match="not a folder, .zip, .tar, .tar.gz or .tar.xz")
    with pytest.raises(ValueError, match="p is not a picture that can be read"):
        data.read_pictures([tmp_path / "p"], (1, 4, 4))


def test_a_link_to_itself_is_one_line(tmp_path, root):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    fails(tmp_path / "a", root, match="no such file or folder")
    assert data.title(tmp_path / "a") == "a"


def header(name, size, kind=tarfile.REGTYPE):
    """A tar's header that says so many bytes follow."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


ABSURD = {"a picture": header("b.png", 1 << 60), "a text": header("b.txt", 1 << 60),
          "less than nothing": header("b.txt", -1024),
          "a name": header("b", 1 << 60, tarfile.GNUTYPE_LONGNAME),
          "a name of less than nothing": header("b", -512, tarfile.GNUTYPE_LONGNAME),
          "further words": header("b", 1 << 40, tarfile.XHDTYPE)}


@pytest.mark.parametrize("what", ABSURD)
@pytest.mark.parametrize("end", (".tar", ".tar.gz", ".tar.xz"))
def test_absurd_sizes_in_an_archive_are_not_followed(what, end, tmp_path, root):
    """They are told at once, with little memory."""
    member = tarfile.TarInfo("a.png")
    content = encoded(1)
    member.size = len(content)
    body = member.tobuf() + content + bytes(-len(content) % 512) + ABSURD[what] + bytes(2048)
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(end[-3:], bytes)
    (tmp_path / f"s{end}").write_bytes(pack(body))
    began = time.monotonic()
    fails(tmp_path / f"s{end}", root, match="damaged|more than 100 times as large")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("end", (".zip", ".tar.gz", ".tar.xz", "after the end"))
def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(end, tmp_path, root, monkeypatch):
    monkeypatch.setattr(data, "MOST_UNPACKED", 1 << 22)
    if end == "after the end":
        source = archive(tmp_path / "s.tar", {"a.png": encoded(1)})
        source = tmp_path / "s.tar.gz"
        source.write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes() + bytes(1 << 23)))
    else:
        source = archive(tmp_path / f"s{end}", {
            "a.png": encoded(1), "b.txt": bytes(1 << 23), "c.png": encoded(2)})
    fails(source, root,
          match="more than 100 times as large as it is: give the pictures as a folder")
    monkeypatch.setattr(data, "MOST_UNPACKED", 1 << 26)
    assert data.load(source, root).left_out.keys() <= {".txt"}


@pytest.mark.parametrize("end", (".tar.gz", ".tar.xz"))
def test_a_changed_byte_in_a_packed_archive_is_damage(end, tmp_path, root):
    """Where the picture would decode all the same: of a BMP, and the checksum itself."""
    picture = encoded(rng.integers(0, 256, (40, 40, 3), np.uint8), "bmp")
    whole = archive(tmp_path / f"whole{end}", {"a.bmp": picture}).read_bytes()
    for place in (len(whole) // 2, len(whole) - 6):
        content = bytearray(whole)
        content[place] ^= 4
        (tmp_path / f"s{end}").write_bytes(content)
        fails(tmp_path / f"s{end}", root, match="damaged|no picture")


def test_drawn_pictures_have_a_largest_side(root):
    for name in ("digits", "words", "stacked"):
        fails(name, root, size=257,
              match=f"--size 257: {name} are drawn with a side of at most 256")


# ------------------------------------------------------------------------------------ read_pictures
def test_read_pictures(tmp_path):
    source = folder(tmp_path, {
        "a.png": encoded(RAMP), "b.jpg": encoded(np.full((9, 20, 3), 51, np.uint8), "jpeg"),
        "c.png": b"hello", "d.png": encoded(RAMP)[:50]})
    x = data.read_pictures([source / "a.png", str(source / "b.jpg")], (3, 4, 4))
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32
    assert_close(x[0], torch.from_numpy(RAMP / 127.5 - 1).float().expand(3, 4, 4))
    assert_close(x[1], torch.full((3, 4, 4), -0.6), rtol=0, atol=3 / 127.5)
    assert torch.equal(data.read_pictures([source / "a.png"], (1, 4, 4)), x[:1, :1])
    for name in ("c.png", "d.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name} is not (a picture|there)") as error:
            data.read_pictures([source / "a.png", source / name], (3, 4, 4))
        assert "\n" not in str(error.value)


def test_importing_it_is_cheap():
    code = ("import sys, common.data; "
            "print([m for m in ('PIL', 'triton', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True).stdout == "[]\n"


# --------------------------------------------------------------------------------- real photographs
REAL = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_real_photographs(root, capsys):
    train, test = data.load(REAL, root), data.load(REAL, root, split="test")
    assert (train.classes == data.CIFAR and train.shape == (3, 32, 32)
            and capsys.readouterr().err == "")
    assert (train.labels.bincount().tolist() == [5000] * 10
            and test.labels.bincount().tolist() == [1000] * 10)
    planes = data.load(REAL, root, 16, ["airplane"])
    assert planes.images.shape == (5000, 3, 16, 16) and planes.classes == ["airplane"]
    boxes = train.images[:5000].view(5000, 3, 16, 2, 16, 2).float().mean((3, 5))
    assert (planes.images - boxes).abs().max() <= 1
    published = torch.tensor([0.4914, 0.4822, 0.4465])  # the training set's mean
    assert_close(train.images.float().mean((0, 2, 3)) / 255, published, rtol=0, atol=0.005)
    with tarfile.open(REAL) as t:
        member = next(m for m in t if re.search("train/airplane/.*jpg", m.name))
        one = np.asarray(Image.open(t.extractfile(member))).transpose(2, 0, 1)
    assert (train.images[:5000].numpy() == one).all((1, 2, 3)).sum() == 1


def test_mnist_in_the_root_is_not_fashion_mnist(root, monkeypatch):
    """Both publish the same file names; their first labels tell them apart."""
    labels = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5], np.uint8)  # how MNIST's begin
    folder(root, mnist(train_labels=labels))
    monkeypatch.setitem(data.SOURCES, "fashion-mnist", ((), *data.SOURCES["fashion-mnist"][1:]))
    fails("fashion-mnist", root, match="could not fetch")
    assert len(data.load("mnist", root)) == 12


def test_a_picture_beside_train_and_test_does_not_hide_them(tmp_path, root):
    files = {f"set/{split}/{i}.png": encoded(i + 100 * (split == "test"))
             for split in ("train", "test") for i in range(5)}
    path = archive(tmp_path / "a.zip", {"set/cover.png": encoded(7), **files})
    assert values(data.load(path, root, split="test")) == [100, 101, 102, 103, 104]


def test_a_cache_inside_its_source_is_no_change_of_it(tmp_path):
    folder(tmp_path, {f"{i}.png": encoded(i) for i in range(4)})
    for i in range(2):
        assert len(data.load(tmp_path, tmp_path / "data")) == 3
        (tmp_path / "metrics.csv").write_text(str(i))
    assert len(list(tmp_path.rglob("images.npy"))) == 1


def test_linked_folders_are_followed_once(tmp_path, root):
    folder(tmp_path / "elsewhere", {"cat/1.png": encoded(1), "cat/2.png": encoded(2)})
    source = folder(tmp_path / "set", {})
    source.mkdir()
    (source / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (source / "circle").symlink_to(source)
    train, test = data.load(source, root), data.load(source, root, split="test")
    assert train.classes == ["cat"] and sorted(values(train) + values(test)) == [1, 2]
