"""Every data set: drawn, fetched, or from a folder or archive of pictures.

    train = load("digits")                                   # 18,000 drawn digits, 16 x 16
    test = load("photos.zip", size=64, split="test")         # that split, or a held-out tenth
    x0, label = train.batch(torch.tensor([3, 1, 4]), "cpu")  # (3, C, H, W) in [-1, 1], (3,)

Pictures are uint8, memory-mapped, gathered by index. They are read once, cropped, resized and
written to <root>/cached, sorted by split and class: each is then a slice of one memory-mapped
array, and a set larger than memory works. A source whose size or time has changed is read again.

What was left out, and why, is kept beside the pictures (Dataset.left_out, read); so is a hash of
each picture's file, by which one set is told from another, whatever its name and place.

It knows no flags, no runs and no networks.
"""
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch

from common import text, words
from common.files import naming
from common.gpu import sent
from common.progress import progress

VERSION = 5  # of the cache's format and of the drawing: raise it when either changes
SMALLEST = 256  # hashes by which a set is known again
LARGEST = 1 << 28  # bytes of one file in an archive; a larger one is not read
MOST_UNPACKED, PACKED = 1 << 32, 100  # bytes of an archive's files, or so many times its size
MOST_DRAWN = 256  # side of pictures that are drawn: 20,000 of them are kept
MOST_TEXT = 1 << 20  # bytes of a caption's file
BLOCK = 1 << 16  # bytes
MOST_PIXELS = 178_956_970  # of one picture, Pillow's limit: decoded, in colour, 540 MB
DRAFT = 20_000_000  # pixels from which on a JPEG is decoded at an eighth to a half of its side
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")
TRAIN = ("train", "training")  # names of a split's folder, in any case
TEST = ("test", "testing", "val", "valid", "validation")
CLUTTER = ("thumbs.db", "desktop.ini")  # what file managers leave behind
# Pillow's others are rare, or programs (EPS)
FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 ICO TGA".split()

NAMED = ("digits", "stacked", "words", "swirl", "gaussians", "mnist", "fashion-mnist",
         "cifar10")
POINTS = ("swirl", "gaussians")  # the others are pictures

# 25 Gaussians: a 5 x 5 grid of spacing 2 and sigma 0.05 divided by 4.5, so that all of it lies in
# [-1, 1]
GAUSSIANS_MEANS = torch.cartesian_prod(torch.arange(-4.0, 5, 2), torch.arange(-4.0, 5, 2)) / 4.5
GAUSSIANS_SIGMA = 0.05 / 4.5
SWIRL_SIGMA = 0.01  # of points about the curve

DIGITS = [str(d) for d in range(10)]
FASHION = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
       "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# how the labels of the other of the two begin
OTHERS_LABELS = {"mnist": b"\x09\0\0\3\0\2\7\2", "fashion-mnist": b"\5\0\4\1\x09\2\1\3"}

# name -> addresses, tried in turn; file -> digest, md5 or sha256 by length; and whether that is the
# digest of the download (packed) or of what is in it (unpacked).
SOURCES = {
    "mnist": (
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",
         "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        dict(zip(IDX, ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
                       "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"))),
        "unpacked"),
    "fashion-mnist": (
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
         "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
        dict(zip(IDX, ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                       "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))),
        "packed"),
    "cifar10": (
        ("https://www.cs.toronto.edu/~kriz/",
         "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
         "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/"),
        {"cifar-10-binary": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        "packed"),
}


@dataclasses.dataclass
class Dataset:
    """Pictures, images uint8 (N, C, H, W), or points float32 (N, 2).

    labels are int64 (N,) in 0..len(classes)-1, -1 for none.
    """
    name: str
    images: torch.Tensor | None
    points: torch.Tensor | None
    labels: torch.Tensor
    classes: list
    shape: tuple
    hashes: torch.Tensor | None = None  # int64, of both splits' files and their classes
    left_out: dict = dataclasses.field(default_factory=dict)  # reason: how many files
    held_out: int = 0  # pictures of the source's other split
    capped: bool = False  # the side is `most`, and the pictures' own is another
    captions: torch.Tensor | None = None  # (N, L) numbers of words, as common/text.py has them
    vocabulary: list = dataclasses.field(default_factory=list)  # of the captions to train with
    captions_hash: int = 0  # of both splits
    there: torch.Tensor | None = dataclasses.field(default=None, init=False)  # images on a GPU

    def __len__(self):
        return len(self.labels)

    def batch(self, index, device="cpu", flip=None):
        """x0 float32 in [-1, 1] and labels, on the device, of index (B,) int64.

        flip (B,) bool mirrors those pictures.
        """
        device = torch.device(device)
        label = sent(self.labels[index], device)
        if self.images is None:
            return sent(self.points[index], device), label
        x = self.gathered(index, device)
        if flip is not None:
            x = torch.where(sent(flip, device).view(-1, 1, 1, 1), x.flip(-1), x)
        return x.to(torch.float32).div_(127.5).sub_(1), label

    def gathered(self, index, device):
        """Pictures of index (B,) on the device, uint8 (B, C, H, W).

        On CUDA from a copy of all of them, made once, where that takes at most a quarter of its
        memory.
        """
        if device.type != "cuda":
            return self.images[index].to(device)
        device = torch.empty(0, device=device).device  # with its number
        if self.there is None or self.there.device != device:
            memory = torch.cuda.get_device_properties(device).total_memory
            if self.images.nbytes > memory / 4:
                return sent(self.images[index], device)
            self.there = self.images.to(device)
        return self.there[sent(index, device)]

    def told(self):
        """What was read, in one line: how many, of which classes, of which shape, what not."""
        what = "points" if self.images is None else "pictures"
        line = f"{len(self):,} {what} to train with"
        if self.held_out:
            line += f", {self.held_out:,} held out"
        if self.images is not None:
            line += ", {} x {} x {}".format(*self.shape)
        counts = self.labels[self.labels >= 0].bincount(minlength=len(self.classes)).tolist()
        if self.classes:
            each = [f"{name} {n:,}" for name, n in zip(self.classes, counts)]
            more = f", ... {len(each) - 10} more" if len(each) > 10 else ""
            line += f"; classes {', '.join(each[:10])}{more}"
            without = int((self.labels < 0).sum())
            line += f", none {without:,}" if without else ""
        if self.captions is not None:
            said = int((self.captions > 0).any(1).sum())
            line += f"; captions beside {said:,}, of {len(self.vocabulary):,} different words"
        return line + (f"; left out: {told(self.left_out)}" if self.left_out else "")

    def content(self):
        """What tells this set from others, whatever it is called and whichever split it is.

        The sum of the hashes of both, how many there are, and the smallest, by which it is found
        again in a set that has grown; and a hash of the captions, if any. None for the sets that
        have a name of their own.
        """
        if self.name in NAMED or self.hashes is None:
            return None
        content = dict(sum=int(self.hashes.sum()), pictures=len(self.hashes),
                       smallest=self.hashes.sort().values[:SMALLEST].tolist())
        return content | (dict(captions=self.captions_hash) if self.vocabulary else {})

    def tokens(self, index):
        """The captions of index (B,) int64 as numbers of words: int64 (B, L)."""
        return self.captions[index].long()

    def caption(self, i):
        """The caption of picture i, its words alone."""
        return text.sentence(self.captions[i], self.vocabulary)

    def levels(self, share=0.999, most=2000):
        """How few of the 256 levels hold that share of the values; looks at 2,000 pictures."""
        index = torch.linspace(0, len(self) - 1, min(len(self), most)).long()
        count = self.images[index].flatten().bincount(minlength=256)
        held = count.sort(descending=True).values.cumsum(0) / count.sum()
        return 1 + int((held < share).sum())


def title(name):
    """What a data set is called: the last part of its path, without an archive's ending."""
    last = os.path.basename(os.path.realpath(name))
    for ending in sorted(ARCHIVES, key=len, reverse=True):
        if last.lower().endswith(ending):
            return last[:-len(ending)]
    return last


def load(name, root="data", size=None, classes=None, split="train", seed=0, most=64):
    """The data set of that name, one of NAMED, or of that path.

    root: where named sets are kept, fetched to and cached; size: side in pixels, default the data's
    own (digits 16; mnist 32; a path: the pictures' own if all are equal and it is at most `most`,
    otherwise `most`); classes: names to keep, default all; split: train or test, where a source
    without one holds out a tenth by a fixed seed. seed: of drawn data. ValueError or OSError of one
    line for wrong input.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: train or test")
    if size is not None and size < 4:
        raise ValueError(f"--size {size} is too small: at least 4")
    if name in POINTS:
        if size or classes:
            raise ValueError(f"--size and --classes are for pictures, and {name} has points")
        points = _points(name, split, seed)
        return Dataset(name, None, points, torch.full((len(points),), -1), [], (2,))
    images, labels, splits, hashes, about = _source(name, Path(root), size, seed, most)
    names = about["classes"]
    unknown = [c for c in classes or () if c not in names]
    if unknown:
        there = ", ".join(names[:20]) or "no classes at all"
        raise ValueError(f"--classes {unknown[0]}: {name} has no such class, but {there}")
    kept = [c for c in names if classes is None or c in classes]
    place = {c: i for i, c in enumerate(kept)}
    # labels among the kept; the last is for no label
    labels = torch.tensor([place.get(c, -1) for c in names] + [-1])[labels]
    of_split = splits == (split == "test")
    of_classes = (labels >= 0) | (classes is None)
    rows = (of_split & of_classes).nonzero()[:, 0]
    if not len(rows):
        wanted = f" of {', '.join(classes)}" if classes else ""
        raise ValueError(f"{name} has no pictures to {split} with{wanted}")
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        part = images[first:last + 1]
    else:
        part = images[rows]  # a copy, only where classes do not touch
    hashes = _of_class(hashes, labels, kept)[of_classes]
    captions = _captions(name, about, of_classes, splits == 0, rows, hashes)
    return Dataset(name, part, None, labels[rows], kept, tuple(images.shape[1:]), hashes,
                   about["left_out"], len(hashes) - len(rows), about["capped"], *captions)


def _captions(name, about, kept, of_training, rows, hashes):
    """Dataset's captions, vocabulary and captions_hash; kept, of_training: bool (N,).

    hashes: of the kept pictures. Only words that are read in training are in the vocabulary, and
    the longest of these captions says how many a caption has.
    """
    captions = about["captions"]
    if captions is None:
        return None, [], 0
    read = captions[kept & of_training]
    used = read.unique()
    used = used[used > 0]
    if not len(used):
        return None, [], 0
    number = torch.zeros(1 + len(about["vocabulary"]), dtype=torch.int32)
    number[used.long()] = torch.arange(1, 1 + len(used), dtype=torch.int32)
    longest = int((read > 0).sum(1).max())
    hashed = 0  # the sum over pictures, wherever they are and whatever they are called
    if name not in NAMED:
        for number_of_file, row in zip(hashes.tolist(), captions[kept]):
            said = f"{number_of_file} {text.sentence(row, about['vocabulary'])}"
            hashed += _hash(said.encode())
    vocabulary = [about["vocabulary"][i - 1] for i in used.tolist()]
    return number[captions[rows, :longest].long()], vocabulary, hashed


def changed(known, dataset):
    """What became of the data whose content() was `known`, in words; "" where nothing did.

    Nothing either where one of them has none: named sets, and runs of before it was kept.
    """
    now = dataset.content()
    if not isinstance(known, dict) or not now:
        return ""
    if "captions" not in known:  # the run learns none
        now.pop("captions", None)
    if known == now:
        return ""
    if known | dict(captions=None) == now | dict(captions=None):
        return "other captions"
    more = now["pictures"] - int(known.get("pictures", 0))
    if more > 0 and {*known.get("smallest", [None])} <= {*dataset.hashes.tolist()}:
        return f"the same data before {more:,} pictures were added"
    return "other data"


def same(known, dataset, path, more=""):
    """ValueError where the data are not those, of content() `known`, that `path` was trained with.

    more: what else can be done.
    """
    what = changed(known, dataset)
    if what:
        raise ValueError(f"{path} was trained with {what} (now in {dataset.name}): give that "
                         f"--data{more}")


def judgeable(dataset, n):
    """ValueError where n samples cannot be judged by the data: before any work."""
    if n < 6:
        raise ValueError(f"--n {n} samples are too few to judge: 6 is the least, better 1000")
    if dataset.images is not None and not dataset.held_out:
        raise ValueError(f"{dataset.name} has {len(dataset)} pictures and holds none out: "
                         "--evaluate needs at least 2")


def _of_class(hashes, labels, names):
    """The hashes of files (N,), int64, changed by the name of each one's class."""
    of_names = [_hash(name.encode()) for name in names] + [0]
    return hashes ^ torch.tensor(of_names, dtype=torch.int64)[labels]


def _hash(content):
    """64 bits of the digest of bytes, as a signed number."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _source(name, root, size, seed, most=64):
    """Cached (images, labels, splits, hashes, about) of the pictures of that name or path."""
    drawn = (size or 16, seed)
    path = Path(os.path.realpath(name))
    if name in ("digits", "words", "stacked") and (size or 0) > MOST_DRAWN:
        raise ValueError(f"--size {size}: {name} are drawn with a side of at most {MOST_DRAWN}")
    if name == "digits":
        return _cached(root, name, drawn, lambda _: (*_draw_digits(*drawn), None, DIGITS))
    if name == "words":
        drawn = (size or 32, seed)
        return _cached(root, name, drawn, lambda _: _draw_words(*drawn))
    if name == "stacked":
        return _cached(root, name, drawn,
                       lambda _: _stack(*_source("digits", root, *drawn)[:3], seed))

    if name in SOURCES:
        files = _files(name, root)
        base, called, key = root, name, (size,)
    elif not path.exists():
        raise ValueError(f"--data {path}: no such file or folder, nor {', '.join(NAMED)}")
    elif not path.is_dir() and not (path.is_file() and path.name.lower().endswith(ARCHIVES)):
        raise ValueError(f"--data {path}: not a folder, .zip, .tar, .tar.gz or .tar.xz")
    else:
        files = [path]
        if path.is_dir():  # pictures and captions alone: runs and the cache may lie in it
            files = [path / f for f, *_ in _walk(path) if _parts(f) or _captioned(f)]
        base, called, key = path, title(path), (str(path), size or f"at most {most}")
    stamp = [(os.path.relpath(f, base), f.stat().st_size, f.stat().st_mtime_ns)
             for f in files if f.exists()]

    if name not in SOURCES and size:  # where that is the side it had by default, it is there
        for most in (32, 64):
            kept = _folder(root, called, (str(path), f"at most {most}", stamp))
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads((kept / "about.json").read_text())["side"] == size:
                    key = str(path), f"at most {most}"

    def make(folder):
        if name in SOURCES:
            return _read_official(name, files, size)
        return _read_path(path, folder, size, most, root)

    try:
        return _cached(root, called, (*key, stamp), make)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as fault:  # tarfile and zipfile raise many things
        raise ValueError(f"--data {name}: {files[0]} is damaged ({fault}): replace it, or delete "
                         "it if it was fetched") from None


def _folder(root, name, key):
    """Where the set of that key is cached."""
    digest = hashlib.sha256(repr((VERSION, key)).encode()).hexdigest()
    return root / "cached" / f"{name}-{digest[:16]}"


def _cached(root, name, key, make):
    """(images, labels, splits, hashes, about) of <root>/cached/<name>-<hash of key>.

    It is first made where it is missing. make(folder) returns images uint8 (N, C, H, W), labels
    (-1: none), splits (1: test; None: hold out a tenth) and names, and of files a dict beside: at
    (N,), their places among the images; called (N,), their names, by which they are put in order;
    hashes (N,); left_out, by reason; capped; captions (N,), texts, if there are any. about has
    left_out, capped, the classes, the side, and of captions the vocabulary and their words as
    numbers in it (N, L). All is written to that temporary folder first and then moved to its place:
    two that make one set at once do not disturb each other.
    """
    import numpy as np
    folder = _folder(root, name, key)
    if not _intact(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent,
                                         ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, folder.name)
            new.mkdir()
            images, labels, splits, names, *of_files = make(Path(temporary))
            n = len(labels)
            places, rank = np.arange(n), np.arange(n)
            about = dict(classes=list(names), side=images.shape[-1], left_out={}, capped=False)
            captions = of_files[0].get("captions") if of_files else None
            if of_files and "hashes" in of_files[0]:
                hashes = of_files[0]["hashes"]
                about |= {name: of_files[0][name] for name in ("left_out", "capped")}
                places = np.asarray(of_files[0]["at"])
                # an archive's own order is none: packed again it is the same data
                rank[sorted(range(n), key=of_files[0]["called"].__getitem__)] = np.arange(n)
            else:
                hashes = [_hash(image.tobytes()) for image in images]
            if splits is None:
                order = np.argsort(rank)[np.random.default_rng(0).permutation(n)]
                splits = _tenth(np.asarray(labels), order)
            order = np.lexsort((rank, labels, splits))
            tokens = None
            if captions:
                about["vocabulary"] = text.vocabulary_of(captions)
                most = max(len(text.words_of(caption)) for caption in captions)
                longest = min(text.LONGEST, most)
                tokens = text.numbers(captions, about["vocabulary"], longest)
            with naming(folder):
                # written, not mapped: a full disk is then an error, not a crash
                with open(new / "images.npy", "wb") as out:
                    header = dict(descr="|u1", fortran_order=False, shape=(n, *images.shape[1:]))
                    np.lib.format.write_array_header_1_0(out, header)
                    out.writelines(images[places[i]].tobytes() for i in order)
                np.save(new / "labels.npy", np.asarray(labels, np.int64)[order])
                np.save(new / "splits.npy", np.asarray(splits, np.uint8)[order])
                np.save(new / "hashes.npy", np.asarray(hashes, np.int64)[order])
                if tokens is not None:
                    np.save(new / "captions.npy", tokens.int().numpy()[order])
                about["sums"] = {file.name: _sum(file) for file in new.glob("*.npy")} \
                    | {"about": _hash(json.dumps(about).encode())}
                (new / "about.json").write_text(json.dumps(about))
            del images  # Windows removes no file that is mapped
            try:
                new.rename(folder)
            except OSError:
                if not _intact(folder):  # else another process was first
                    raise
    # it is read-only: a writable map may not be larger than memory
    with warnings.catch_warnings(action="ignore"):
        images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="r"))
    labels, splits, hashes = (torch.from_numpy(np.load(folder / f"{what}.npy"))
                              for what in ("labels", "splits", "hashes"))
    about = json.loads((folder / "about.json").read_text())
    about["captions"] = None
    if "vocabulary" in about:
        about["captions"] = torch.from_numpy(np.load(folder / "captions.npy"))
    return images, labels, splits, hashes, about


def _sum(path):
    """Hex digits that change with a file: of its length, and of all of it but what is very long.

    Of that it reads 256 blocks, evenly spread.
    """
    digest, size = hashlib.blake2b(digest_size=8), os.stat(path).st_size
    digest.update(str(size).encode())
    last = max(0, size - 1) // BLOCK
    read = min(256, 1 + last)
    with open(path, "rb") as file:
        for i in range(read):  # the first and the last block among them
            file.seek(i * last // max(1, read - 1) * BLOCK)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _intact(folder):
    """Whether a set is cached there, and whole. A damaged one is told and removed."""
    if not folder.exists():
        return False
    # what is not allowed, or fails for another reason of the system's, is no damage
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        about = json.loads((folder / "about.json").read_text())
        sums = about.pop("sums")
        whole = sums.pop("about") == _hash(json.dumps(about).encode())
        if whole and all(_sum(folder / name) == digits for name, digits in sums.items()):
            return True
    print(f"{folder} is damaged: the data are read once more", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise OSError(f"{folder} is damaged and cannot be removed: remove it")
    return False


def _tenth(labels, order):
    """Which are held out, bool (N,): the first tenth in that order, at least one of several.

    A class's last picture is not, since its label would be drawn untrained; the next one is.
    """
    import numpy as np
    left = collections.Counter(labels.tolist())
    held_out = np.zeros(len(labels), bool)
    for i in order:
        if held_out.sum() == (len(labels) // 10 or int(len(labels) > 1)):
            break
        if labels[i] < 0 or left[labels[i]] > 1:
            held_out[i] = True
            left[labels[i]] -= 1
    return held_out


# ------------------------------------------------------------------------------------------ drawn
def _draw_digits(size, seed, count=20_000):
    """Digits, white on black, uint8 (count, 1, size, size), and labels.

    They vary in place, size, aspect, angle, slant and weight. Each is drawn k high, put through one
    affine map, and averaged down.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    k = size * max(1, min(4, 128 // size))
    weights = 8
    rng = np.random.default_rng([seed, size])
    font = ImageFont.load_default(size=k)
    glyphs = []
    for digit in DIGITS:
        for w in range(weights):
            glyph = Image.new("L", (2 * k, 2 * k))
            ImageDraw.Draw(glyph).text((k, k), digit, 255, font=font, anchor="mm",
                                       stroke_width=0.04 * k * w / (weights - 1))
            glyphs.append(glyph.crop(glyph.getbbox()))
    labels = rng.permutation(np.arange(count) % 10)
    which = labels * weights + rng.integers(weights, size=count)
    # width and height: (count, 2, 1)
    extent = np.array([g.size for g in glyphs], float)[which, :, None]
    angle = np.deg2rad(rng.uniform(-15, 15, count))
    slant = rng.uniform(-0.25, 0.25, count)
    scale_y = rng.uniform(0.6, 0.9, count) * k / extent[:, 1, 0]
    scale_x = scale_y * rng.uniform(0.8, 1.2, count)
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
    turn = np.array([[cos, -sin], [sin, cos]]).transpose(2, 0, 1)
    shear = np.array([[scale_x, -slant * scale_y], [zero, scale_y]]).transpose(2, 0, 1)
    to_canvas = turn @ shear
    half = np.abs(to_canvas) @ extent / 2
    fit = np.minimum(1, k / 2 / half.max(1, keepdims=True))  # never over the edge
    centre = k / 2 + rng.uniform(-1, 1, (count, 2, 1)) * (k / 2 - half * fit)
    to_glyph = np.linalg.inv(to_canvas * fit)
    affine = np.concatenate([to_glyph, extent / 2 - to_glyph @ centre], 2)
    drawn = []
    for g, numbers in zip(which, affine.reshape(count, 6).tolist()):
        large = glyphs[g].transform((k, k), Image.AFFINE, numbers, Image.BILINEAR)
        drawn.append(np.asarray(large.reduce(k // size)))
    return np.stack(drawn)[:, None], labels


def _draw_words(size, seed):
    """What _cached wants of the set `words`."""
    images, labels, captions = words.draw(size, seed)
    return images, labels, None, words.ATTRIBUTES["digit"], dict(captions=captions)


def _stack(digits, labels, splits, seed):
    """Images, labels, splits and names of 55,000 stacks of three digits.

    Held-out digits make the last 5,000, which are the held-out stacks.
    """
    import numpy as np
    rng = np.random.default_rng(seed)
    train = np.flatnonzero(splits == 0)
    test = np.flatnonzero(splits)
    rows = np.concatenate([train[rng.integers(len(train), size=(50_000, 3))],
                           test[rng.integers(len(test), size=(5_000, 3))]])
    images = digits.numpy()[rows, 0]
    numbers = labels.numpy()[rows] @ [100, 10, 1]
    names = [f"{i:03}" for i in range(1000)]
    return images, numbers, np.arange(len(rows)) >= 50_000, names


def swirl_curve(u):
    """The line that the swirl's points lie along, at u (n,) in [0, 1]: (n, 2)."""
    angle = 1.5 * torch.pi * (1 + 2 * u)
    radius = angle / (4.5 * torch.pi) * 0.95
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _points(name, split, seed):
    """1,024 points of a swirl of one and a half turns, or 20,000 of the 25 Gaussians.

    The test split is another draw, of the Gaussians 2,000.
    """
    g = torch.Generator().manual_seed(2 * seed + (split == "test"))
    if name == "swirl":
        curve = swirl_curve(torch.rand(1024, generator=g))
        return (curve + SWIRL_SIGMA * torch.randn(1024, 2, generator=g)).clamp(-1, 1)
    n = 2_000 if split == "test" else 20_000
    means = GAUSSIANS_MEANS[torch.randint(25, (n,), generator=g)]
    return means + GAUSSIANS_SIGMA * torch.randn(n, 2, generator=g)


# --------------------------------------------------------------------------- fetched and official
def _files(name, root):
    """The official files of a named set, from root/name or root, fetched if they are in neither."""
    places = [root / name, root]
    ending = ".gz"
    if name == "cifar10":
        ending = ".tar.gz"
        for folder in (*places, *(place / "cifar-10-batches-bin" for place in places)):
            if (folder / BATCHES[-1]).is_file():
                return [folder / batch for batch in BATCHES]

    # MNIST and Fashion-MNIST share their files' names: those in root itself may be the other's
    others = OTHERS_LABELS.get(name)
    in_root = (root / IDX[1], root / f"{IDX[1]}.gz")
    if any(_content(f)[8:16] == others for f in in_root if f.is_file()):
        places.pop()
    found = []
    for stem in SOURCES[name][1]:
        ways = (stem, stem + ending, stem.replace("-idx", ".idx"))
        files = [place / way for place in places for way in ways]
        there = next((f for f in files if f.is_file()), None)
        found.append(there or _fetch(name, stem, root / name / (stem + ending)))
    return found


def _content(file):
    """What is in a file, raw or gzip; nothing if it is damaged."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(file, "rb") as unpacked:
            content = unpacked.read(LARGEST + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return b""
    return content if len(content) <= LARGEST else b""


def _fetch(name, stem, file):
    """Download one file: a temporary name, checked against its digest, then its own name.

    The next address is tried where one fails.
    """
    addresses, digests, what = SOURCES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    faults = []
    for address in addresses:
        url = address + file.name
        try:
            with (urllib.request.urlopen(url, timeout=30) as source,
                  open(temporary, "wb") as out):
                with progress(text=f"fetching {file.name}", total=source.length, unit="B",
                              unit_scale=True) as bar:
                    while part := source.read(1 << 18):
                        out.write(part)
                        bar.update(len(part))
                if source.length:  # what is yet to come
                    raise ValueError(f"cut at {out.tell()} of {out.tell() + source.length} bytes")
            content = _content(temporary) if what == "unpacked" else temporary.read_bytes()
            algorithm = "md5" if len(digests[stem]) == 32 else "sha256"
            if hashlib.new(algorithm, content).hexdigest() != digests[stem]:
                raise ValueError("its digest is wrong")
            return temporary.replace(file)
        except Exception as fault:
            faults.append(f"{url}: {' '.join(str(fault).split())}")  # of one line
        finally:
            temporary.unlink(missing_ok=True)
    raise ValueError(f"could not fetch {file.name} ({'; '.join(faults)}): put the file into "
                     f"{file.parent} yourself")


def _read_official(name, files, size):
    """Images, labels, splits, names of CIFAR-10's binary archive or the six files in it, or of IDX.

    Pictures of IDX files are padded to 32 x 32.
    """
    import numpy as np
    from PIL import Image
    if name == "cifar10":
        if len(files) == 1:
            found = _walk(files[0])
        else:
            found = ((f.name, 1, f.read_bytes) for f in files if f.is_file())
        parts = {}
        for file, length, read in found:
            n = PurePosixPath(file).name
            if n in BATCHES and 0 < length < LARGEST:
                parts[n] = read()
        for n in BATCHES:
            if not parts.get(n) or len(parts[n]) % 3073 or max(parts[n][::3073]) > 9:
                raise ValueError(f"{files[0]}: {n} is missing or damaged: delete it to fetch it "
                                 "again")
        records = np.frombuffer(b"".join(parts[n] for n in BATCHES), np.uint8).reshape(-1, 3073)
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        labels = records[:, 0]
        tests = len(parts[BATCHES[-1]]) // 3073
    else:
        arrays = []
        for file in files:
            content = _content(file)
            shape = (28, 28) if "images" in file.name else ()
            start = 8 + 4 * len(shape)
            n, rest = divmod(len(content) - start, int(np.prod(shape)))
            magic = 0x801 + len(shape)
            if (n < 1 or rest
                    or content[:start] != np.array([magic, n, *shape], ">u4").tobytes()):
                raise ValueError(f"{file} is not an IDX file of 28 x 28 pictures or their labels: "
                                 "delete it to fetch it again")
            arrays.append(np.frombuffer(content, np.uint8, offset=start).reshape(n, *shape))
        images = np.concatenate(arrays[::2])
        labels = np.concatenate(arrays[1::2])
        tests = len(arrays[3])
        if len(images) != len(labels) or len(arrays[2]) != tests or labels.max() > 9:
            raise ValueError(f"{files[0].parent}: images and labels do not belong together: delete "
                             "them to fetch them again")
        images = np.pad(images[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))
    if size and size != 32:
        print(f"resizing {name} to {size} x {size}", file=sys.stderr)
        pictures = (Image.fromarray(i.transpose(1, 2, 0).squeeze()) for i in images)
        images = np.stack([_pixels(picture, size, images.shape[1] == 1) for picture in pictures])
    splits = np.arange(len(labels)) >= len(labels) - tests
    return images, labels, splits, dict(mnist=DIGITS, cifar10=CIFAR).get(name, FASHION)


# -------------------------------------------------------------------------- folders and archives
class Unread(Exception):
    """Why a file is left out, in words that follow a number of files."""


def _walk(path, shut=None):
    """(name, size, read function) of every file of a folder or archive.

    Each is to be read at once: nothing is unpacked to disk. Reading raises Unread where the reason
    is known. shut: a list that receives the folders that cannot be opened.
    """
    if path.is_dir():
        seen = set()  # linked folders are followed, each once: links may make a ring

        def failed(fault):
            if shut is not None:
                shut.append(fault.filename)

        for folder, inner, files in os.walk(path, followlinks=True, onerror=failed):
            real = os.path.realpath(folder)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner.sort()
            for name in sorted(files):
                file = Path(folder, name)
                size = file.stat().st_size if file.exists() else 0
                yield file.relative_to(path).as_posix(), size, file.read_bytes
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            unpacked = 0
            for info in archive.infolist():
                unpacked += info.file_size
                _plausible(path, unpacked)
                name = info.filename.replace("\\", "/")  # as some programs on Windows write them
                if not name.endswith("/"):
                    yield name, info.file_size, lambda: _unzipped(archive, info)
    else:
        try:
            yield from _tarred(path)
        except OSError as fault:
            if fault.errno is None:  # the decompressors', and none of the system's
                raise tarfile.ReadError(str(fault)) from None
            raise


def _tarred(path):
    """(name, size, read function) of every file of a .tar, packed or not, to its last checksum."""
    with open(path, "rb") as file:
        begins = file.read(6)
    marks = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open}
    packed = next((way for mark, way in marks.items() if begins.startswith(mark)), open)
    unpacked = 0
    with packed(path, "rb") as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
        for member in archive:
            # counted before it is passed over, which unpacks it; less than nothing goes back
            unpacked += 512 + member.size
            if member.size < 0:
                raise tarfile.ReadError("a size in it is absurd")
            _plausible(path, unpacked)
            if not member.isdir():
                # of links, which have no size, nothing is read
                size = member.size if member.isfile() else 0
                yield member.name, size, lambda: archive.extractfile(member).read()
        # tarfile stops at a damaged or missing header too: the end is a block of zeros, and zeros
        # or nothing after it
        if file.tell() < archive.offset + 512 or file.read(512).strip(b"\0"):
            raise tarfile.ReadError("a header is damaged or missing")
        for block in iter(lambda: file.read(1 << 20), b""):  # up to gzip's checksum
            unpacked += len(block)
            _plausible(path, unpacked)


class _Bounded:
    """A file of which no more than LARGEST bytes are read at once: tarfile believes its headers."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size):
        if not 0 <= size <= LARGEST:
            raise tarfile.ReadError("a size in it is absurd")
        return self.file.read(size)


def _plausible(path, unpacked):
    """ValueError where an archive's files have more bytes than pictures can have."""
    if unpacked > max(MOST_UNPACKED, PACKED * os.stat(path).st_size):
        raise ValueError(f"--data {path}: its files are more than {PACKED} times as large as it "
                         "is: give the pictures as a folder")


def _unzipped(archive, info):
    """The bytes of a zip's entry; Unread for an encrypted one and for a foreign compression."""
    if info.flag_bits & 1:
        raise Unread("encrypted")
    try:
        return archive.read(info)
    except NotImplementedError:
        raise Unread(f"compressed by method {info.compress_type} of zip, which Python has not") \
            from None


def _captioned(name):
    """Of a caption's file, `name.txt` as people keep it beside `name.png`, the name; else ""."""
    ending = PurePosixPath(name).suffix
    return "/".join(_visible(name)).removesuffix(ending) if ending.lower() == ".txt" else ""


def _caption(content):
    """The text of a caption's file, and how many lines with words are left out: the first is read.

    It is UTF-8, UTF-16 with its mark, or else Latin-1.
    """
    for encoding in ("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig",
                     "latin-1"):
        with contextlib.suppress(UnicodeError):
            lines = [line for line in content.decode(encoding).splitlines() if text.words_of(line)]
            return (lines[0], len(lines) - 1) if lines else ("", 0)


def _parts(name):
    """The folders and the name of a picture file.

    Nothing where the ending is no picture's or one of them is hidden.
    """
    from PIL import Image
    parts = _visible(name)
    ending = PurePosixPath(name).suffix.lower()
    return parts if Image.registered_extensions().get(ending) in FORMATS else []


def _ours(path, root):
    """How names begin of what is kept under the data root, where that lies in the folder `path`."""
    try:
        inner = Path(os.path.relpath(root, path)).as_posix()
    except ValueError:  # on another drive
        return ()
    start = "" if inner == "." else inner + "/"
    return tuple(start + word for word in ("cached/", "classifier-", "features-",
                                            "inception-"))


def _visible(name):
    """The folders and the name of a file that people see; else nothing."""
    parts = [p for p in PurePosixPath(name).parts if p not in ("..", ".", "/")]
    hidden = any(p.startswith((".", "__MACOSX")) for p in parts)
    return [] if not parts or hidden or parts[-1].lower() in CLUTTER else parts


def _open(file):
    """The PIL picture of a file, not yet decoded. Unread for more than MOST_PIXELS."""
    from PIL import Image
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        try:
            picture = Image.open(file, formats=formats)  # whatever its name says
        except Image.DecompressionBombError as fault:
            pixels = int("".join(filter(str.isdigit, str(fault).partition("(")[2].split()[0])))
            raise Unread(f"of {pixels / 1e6:.0f} megapixels") from None
    if picture.width * picture.height > MOST_PIXELS:
        raise Unread(f"of {picture.width * picture.height / 1e6:.0f} megapixels")
    return picture


@contextlib.contextmanager
def _opening():
    """Around reading a file of a folder: Unread where the system does not allow it."""
    try:
        yield
    except OSError:
        raise Unread("that cannot be opened") from None


def _pictures(path, what, left_out, root, shut=None, captions=None):
    """(parts of the name, opened PIL picture, hash of the file) of every picture file.

    What is left out is counted in left_out, by its reason; the caller counts what it cannot decode.
    captions: a dict that receives the texts beside pictures, by the files' names without endings.
    """
    files, ours = progress(_walk(path, shut), what, unit=" files"), _ours(path, root)
    for name, size, read in files:
        parts = _parts(name)
        if captions is not None and _captioned(name) and 0 < size < MOST_TEXT:
            try:
                captions[_captioned(name)], rest = _caption(read())
            except Exception:  # an archive may be damaged just here
                left_out[".txt that cannot be read"] += 1
            else:
                left_out["captions' further lines"] += rest
            continue
        if not parts:
            if _visible(name) and not name.startswith(ours):
                ending = PurePosixPath(name).suffix.lower()
                left_out[ending or "without an ending"] += 1
            continue
        try:
            if not 0 < size < LARGEST:
                raise Unread(f"of more than {LARGEST >> 20} MiB" if size else "empty or a link")
            with contextlib.nullcontext() if path.is_file() else _opening():
                content = read()
            picture = _open(io.BytesIO(content))
        except Unread as why:
            left_out[str(why)] += 1
        except MemoryError:
            raise
        except Exception:  # damaged files raise anything
            left_out["damaged"] += 1
            left_out.setdefault("first", "/".join(parts))
        else:
            yield parts, picture, _hash(content)


def _pixels(picture, size, grey):
    """A PIL picture of any mode as uint8 (C, size, size).

    It is turned upright, laid over white where transparent, and its centre square is resized.
    """
    import numpy as np
    from PIL import Image, ImageOps
    if picture.width * picture.height > DRAFT:
        picture.draft(picture.mode, (4 * size, 4 * size))  # of a JPEG: in less memory
    picture.load()
    # turned as a camera says; what is no EXIF, which many programs leave, says nothing
    with contextlib.suppress(Exception):
        picture = ImageOps.exif_transpose(picture)
    clear = None
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits or more to 8
        values = np.asarray(picture).astype(np.float64)
        if isinstance(picture.info.get("transparency"), int):
            clear = values == picture.info["transparency"]
        scale = 1 / 257
        if picture.mode == "F":
            scale = 255 if values.max() <= 1 else 1
        picture = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if clear is not None:
        picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if grey else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), Image.BOX if size < side else Image.BICUBIC)
    return np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)


def _read_path(path, folder, size, most, root):
    """Read the source twice: the headers, to settle size and channels, and then the pixels.

    These go straight into a file in folder.
    """
    import numpy as np
    heads = {(*p.size, p.mode) for _, p, _ in
             _pictures(path, f"looking through {path.name}", collections.Counter(), root)}
    grey = all(mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") for *_, mode in heads)
    sides = {side for head in heads for side in head[:2]}
    own = sides.copy().pop() if len(sides) == 1 else 0
    capped = not size and not 0 < own <= most
    size = size or min(most, *sides if len(sides) == 1 else (most,))
    if size < 4:
        raise ValueError(f"--data {path}: pictures of {size} pixels are too small; give --size")
    rows, hashes, left_out, shut = [], [], collections.Counter(), []
    written_beside = {}
    with open(folder / "raw", "wb") as raw:
        for parts, picture, number in _pictures(path, f"reading {path.name}", left_out, root,
                                                shut, written_beside):
            try:
                pixels = _pixels(picture, size, grey).tobytes()
            except MemoryError:
                raise
            except Exception:  # decoders of damaged pictures raise anything
                left_out["damaged"] += 1
                left_out.setdefault("first", "/".join(parts))
            else:
                raw.write(pixels)
                rows.append(parts)
                hashes.append(number)
    for name in shut:
        left_out[f"in {os.path.relpath(name, path)}, a folder that cannot be opened"] += 1
    if not rows:
        why = f" ({told(left_out)})" if left_out else ""
        raise ValueError(f"--data {path}: no picture in it can be read{why}")
    stems = ["/".join(parts).removesuffix(PurePosixPath(parts[-1]).suffix) for parts in rows]
    captions = [written_beside.get(stem, "") for stem in stems]
    alone = len(written_beside.keys() - {*stems})
    if alone:
        left_out[".txt without a picture of that name"] += alone
    cut = sum(len(text.words_of(caption)) > text.LONGEST for caption in captions)
    if cut:
        left_out[f"captions' words after the first {text.LONGEST}"] += cut
    rows, own, splits, kept = _classes(rows, left_out)
    names = sorted({*own} - {""})
    number = {c: i for i, c in enumerate(names)}
    images = np.memmap(folder / "raw", np.uint8, "r",
                       shape=(len(hashes), 1 if grey else 3, size, size))
    left_out = {why: many for why, many in left_out.items() if many}
    files = dict(at=kept, called=rows, hashes=[hashes[i] for i in kept], left_out=left_out,
                 capped=capped)
    if any(captions):
        files["captions"] = [captions[i] for i in kept]
    return images, [number.get(c, -1) for c in own], splits, names, files


def _classes(rows, left_out):
    """What folders say: rows, classes ("" for none), splits (None where there is none), and kept.

    rows: the parts of each picture's name; kept: which of them are. Top folders called as TRAIN and
    TEST, in any case, are splits; but train/ without a test/ among other folders is a class. Beside
    both splits, other folders are left out, and so are held-out pictures of a class that training
    does not have.
    """
    splits = {*TRAIN, *TEST}

    def is_split(row):
        return len(row) > 1 and row[0].lower() in splits

    # a folder around it all is taken off
    while len({p[0] for p in rows}) == 1 and rows[0][0].lower() not in splits:
        deeper = [p for p in rows if len(p) > 2]
        if len(deeper) < len(rows) and not any(p[1].lower() in splits for p in deeper):
            break
        rows = [p[1:] for p in rows]
    tops = {p[0].lower() for p in rows if len(p) > 1}
    both = tops & {*TRAIN} and tops & {*TEST}
    split = tops & {*TEST} or tops <= splits
    kept, own, held = [], [], []
    for i, row in enumerate(rows):
        top = row[0].lower() if split and is_split(row) else ""
        if both and not top and len(row) > 1:
            left_out[f"in {row[0]}, beside train and test"] += 1
            continue
        kept.append(i)
        own.append(row[-2] if len(row) > 1 + bool(top) else "")
        held.append(top in TEST)
    if any(held) and not all(held):
        trained = {c for c, test in zip(own, held) if not test} | {""}
        strange = [test and c not in trained for c, test in zip(own, held)]
        for c, odd in zip(own, strange):
            if odd:
                left_out[f"of {c} in test, which train has not"] += 1
        kept, own, held = ([value for value, odd in zip(values, strange) if not odd]
                           for values in (kept, own, held))
    return [rows[i] for i in kept], own, held if any(held) else None, kept


def told(left_out):
    """What was left out, by reason, as text: the ten most frequent."""
    reasons = sorted((why for why in left_out if why != "first"), key=left_out.get, reverse=True)
    what = ", ".join(f"{left_out[why]} {why}" for why in reasons[:10])
    rest = sum(left_out[why] for why in reasons[10:])
    what += f", {rest} others" if rest else ""
    return what + (f", the first is {left_out['first']}" if "first" in left_out else "")


def read_pictures(paths, shape, tell=False):
    """Picture files as (N, C, H, W) in [-1, 1], made shape (C, H, H) as a data set's are.

    tell: say where that changes them. ValueError of one line for what cannot be read.
    """
    pictures, changed, form = [], 0, (shape[-1], shape[-1], "L" if shape[0] == 1 else "RGB")
    for path in paths:
        try:
            if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
                raise ValueError("no file")
            with _open(path) as picture:
                changed += (*picture.size, picture.mode) != form
                pixels = _pixels(picture, shape[-1], shape[0] == 1)
                pictures.append(torch.from_numpy(pixels.copy()))
        except FileNotFoundError:
            raise ValueError(f"{path} is not there: give picture files") from None
        except Unread as why:
            raise ValueError(f"{path} is a picture {why}: give one of at most "
                             f"{MOST_PIXELS // 1_000_000}") from None
        except Exception:  # as above
            raise ValueError(f"{path} is not a picture that can be read") from None
    if tell and changed:
        print(f"{changed} of {len(pictures)} pictures are made {form[0]} x {form[1]} {form[2]}, as "
              "the data's that the model knows", file=sys.stderr)
    return torch.stack(pictures).float().div(127.5).sub(1)


def read_edit(image, mask, shape):
    """A picture file as (1, C, H, W) in [-1, 1], and its part under a mask's white: (1, 1, H, W).

    The picture is made shape (C, H, H) as a data set's are, which is said where that changes it,
    and the mask, as large as the picture's file, with it; "" is no mask, and then None. White is
    what is lighter than the middle grey. ValueError of one line for what cannot be read, a mask of
    another size, or one without white.
    """
    x = read_pictures([image], shape)
    width, height, mode = _form(image)
    channels, side, _ = shape
    own = "L" if channels == 1 else "RGB"
    white = read_pictures([mask], (1, side, side)) > 0 if mask else None
    if mask:
        wide, high, _ = _form(mask)
        if (wide, high) != (width, height):
            raise ValueError(f"--mask {mask} is {wide} x {high}, and --image {image} is {width} x "
                             f"{height}: give a mask of the picture's size")
        if not white.any():
            raise ValueError(f"--mask {mask} has no white where the picture is: nothing would be "
                             "painted")
    if (width, height, mode) != (side, side, own):
        what = "it" if width == height else "its middle square"
        print(f"{image}, {width} x {height} {mode}: {what} is made {side} x {side} {own}, as the "
              "data are", file=sys.stderr)
    return x, white


def _form(path):
    """Width, height and mode ("L", "RGB", ...) of a picture file that can be read, upright."""
    from PIL import ImageOps
    with _open(path) as picture:
        with contextlib.suppress(Exception):  # as in _pixels
            picture = ImageOps.exif_transpose(picture)
        return *picture.size, picture.mode
