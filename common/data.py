"""Every data set: drawn, fetched, or from a folder or archive of pictures; as uint8, memory-mapped, gathered by index.

    train = load("digits")                                       # 18,000 drawn digits, 16 x 16
    test = load("photos.zip", size=64, split="test")             # the split of that name, or a held-out tenth
    x0, label = train.batch(torch.tensor([3, 1, 4]), "cpu")      # (3, C, H, W) in [-1, 1], (3,)

Pictures are read once, cropped, resized and written to <root>/cached/<key>, sorted by split and class, so that a split or a class
is a slice of one memory-mapped array, and a set larger than memory works. The key holds the size and time of the source: when it
changes, it is read again.
"""
import dataclasses
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import sys
import tarfile
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch

VERSION = 1  # of the cache's format and of the drawing: raise it when either changes
LARGEST = 1 << 28  # bytes of one file in an archive; a larger one is not read
FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM AVIF JPEG2000 ICO TGA".split()  # Pillow's others are rare, or programs (EPS)

# 25 Gaussians: a 5 x 5 grid of spacing 2 and sigma 0.05 divided by 4.5, so that all of it lies in [-1, 1]
GAUSSIANS_MEANS = torch.cartesian_prod(torch.arange(-4.0, 5, 2), torch.arange(-4.0, 5, 2)) / 4.5
GAUSSIANS_SIGMA = 0.05 / 4.5

DIGITS = [str(d) for d in range(10)]
FASHION = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()

BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]

# file -> digest of the download, or of what is in it: md5 or sha256 by length. Addresses are tried in turn.
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
OTHERS_LABELS = {"mnist": bytes([9, 0, 0, 3, 0, 2, 7, 2]), "fashion-mnist": bytes([5, 0, 4, 1, 9, 2, 1, 3])}  # how the other's begin
SOURCES = {
    "mnist": (("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
              dict(zip(IDX, ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
                             "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"))), "unpacked"),
    "fashion-mnist": (("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                       "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
                      dict(zip(IDX, ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                                     "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))), "packed"),
    "cifar10": (("https://www.cs.toronto.edu/~kriz/", "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
                 "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/"),
                {"cifar-10-binary": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}, "packed"),
}


@dataclasses.dataclass
class Dataset:
    """Pictures, images uint8 (N, C, H, W), or points float32 (N, 2); labels int64 (N,) in 0..len(classes)-1, -1 for none."""
    name: str
    images: torch.Tensor | None
    points: torch.Tensor | None
    labels: torch.Tensor
    classes: list
    shape: tuple

    def __len__(self):
        return len(self.labels)

    def batch(self, index, device="cpu", flip=None):
        """x0 float32 in [-1, 1] and labels, on the device, of index (B,) int64; flip (B,) bool mirrors those pictures."""
        label = self.labels[index].to(device)
        if self.images is None:
            return self.points[index].to(device), label
        x = self.images[index].to(device)
        if flip is not None:
            x = torch.where(flip.to(device).view(-1, 1, 1, 1), x.flip(-1), x)
        return x.to(torch.float32).div_(127.5).sub_(1), label


def load(name, root="data", size=None, classes=None, split="train", seed=0):
    """The data set of that name (digits, stacked, swirl, gaussians, mnist, fashion-mnist, cifar10) or path.

    root: where named sets are kept, fetched to and cached; size: side in pixels, default the data's own (digits 16; mnist 32; a
    path: the pictures' own if all are equal, otherwise 64); classes: names to keep, default all; split: train or test, where a
    source without one holds out a tenth by a fixed seed. seed: of drawn data. ValueError or OSError, one line, says what is wrong.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: train or test")
    if size is not None and size < 4:
        raise ValueError(f"--size {size} is too small: at least 4")
    if name in ("swirl", "gaussians"):
        if size or classes:
            raise ValueError(f"--size and --classes are for pictures, and {name} has points")
        points, labels = (_swirl if name == "swirl" else _gaussians)(split, seed)
        return Dataset(name, None, points, labels, [], (2,))
    images, labels, splits, names = _named(name, Path(root), size, seed) if name in SOURCES or name in ("digits", "stacked") else \
        _path(Path(name), Path(root), size)
    return _choose(name, images, labels, splits, names, classes, split)


def _choose(name, images, labels, splits, names, classes, split):
    """The part of a cached set, which is sorted by split and class: slices of the array, copied only where they do not touch."""
    for c in classes or ():
        if c not in names:
            raise ValueError(f"--classes {c}: {name} has no such class, but " + (", ".join(names[:20]) or "no classes at all"))
    wanted = torch.tensor([-1] + [i for i, c in enumerate(names) if classes is None or c in classes])
    inside = torch.from_numpy(splits == (split == "test")) & torch.isin(labels, wanted[0 if classes is None else 1:])
    rows = inside.nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"{name} has no pictures to {split} with" + (f" of {', '.join(classes)}" if classes else ""))
    touch = int(rows[-1] - rows[0]) + 1 == len(rows)
    part = images[int(rows[0]):int(rows[-1]) + 1] if touch else images[rows]
    number = torch.searchsorted(wanted, labels[rows]) - 1  # among the kept classes; -1 stays
    return Dataset(name, part, None, number, [names[i] for i in wanted[1:]], tuple(images.shape[1:]))


# ------------------------------------------------------------------------------------------------------------- cache


def _cached(root, key, make):
    """(images, labels, splits, names) of folder <root>/cached/<key>; make(folder) writes it first where it is missing.

    make leaves images.npy, labels.npy, splits.npy (uint8, 1 for test), sorted by split and class, and classes.json in the folder it
    is given, which then takes the key as its name: processes that make the same set at once do not disturb each other.
    """
    import numpy as np
    folder = root / "cached" / key
    if not (folder / "classes.json").exists():
        temporary = root / "cached" / f".{uuid.uuid4().hex}-{key}"
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not (folder / "classes.json").exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    with warnings.catch_warnings():  # read-only, of which PyTorch warns: a writable map may not be larger than memory
        warnings.simplefilter("ignore")
        images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="r"))
    return (images, torch.from_numpy(np.load(folder / "labels.npy")), np.load(folder / "splits.npy"),
            json.loads((folder / "classes.json").read_text()))


def _store(folder, images, labels, splits, names):
    """Write one cache folder, sorted. images: uint8 array (N, C, H, W), memory-mapped or not."""
    import numpy as np
    order = np.lexsort((labels, splits))
    with open(folder / "images.npy", "wb") as out:  # written, not mapped: a full disk is then an error, not a crash
        np.lib.format.write_array_header_1_0(out, dict(descr="|u1", fortran_order=False, shape=images.shape))
        for i in order:
            out.write(images[i].tobytes())
    np.save(folder / "labels.npy", np.asarray(labels, np.int64)[order])
    np.save(folder / "splits.npy", np.asarray(splits, np.uint8)[order])
    (folder / "classes.json").write_text(json.dumps(names))


def _hold_out(n):
    """1 for the tenth of n pictures that is never trained on, chosen by a fixed seed, 0 for the others."""
    import numpy as np
    splits = np.zeros(n, np.uint8)
    splits[np.random.default_rng(0).permutation(n)[:max(1, n // 10)] if n > 1 else []] = 1
    return splits


def _key(*parts):
    return hashlib.sha256(repr((VERSION, parts)).encode()).hexdigest()[:16]


def _stamp(files, base):
    """What changes when one of the files does."""
    return [(os.path.relpath(f, base), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]


# ------------------------------------------------------------------------------------------------------------- drawn


def _draw_digits(size, seed, count=20_000):
    """count white digits on black, uint8 (count, 1, size, size), and their labels: Pillow's own font, varied in place, size,
    aspect, angle, slant and weight. Each glyph is drawn a few times as large, put through one affine map, and averaged down.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    rng, k, weights = np.random.default_rng([seed, size]), size * max(1, min(4, 128 // size)), 8
    font = ImageFont.load_default(size=k)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("--data digits needs Pillow with FreeType: reinstall it with pip install --force-reinstall pillow")
    glyphs = []
    for digit in DIGITS:
        for w in range(weights):
            glyph = Image.new("L", (2 * k, 2 * k))
            ImageDraw.Draw(glyph).text((k, k), digit, 255, font=font, anchor="mm", stroke_width=0.04 * k * w / (weights - 1))
            glyphs.append(glyph.crop(glyph.getbbox()))

    def uniform(low, high):
        return rng.uniform(low, high, count)
    labels = rng.permutation(np.arange(count) % 10)
    which = labels * weights + rng.integers(weights, size=count)
    extent = np.array([g.size for g in glyphs], float)[which]  # (count, 2): width, height
    angle, slant = np.deg2rad(uniform(-15, 15)), uniform(-0.25, 0.25)
    scale_y = uniform(0.6, 0.9) * k / extent[:, 1]
    scale_x = scale_y * uniform(0.8, 1.2)
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(count)
    turn = np.array([[cos, -sin], [sin, cos]]).transpose(2, 0, 1)
    to_canvas = turn @ np.array([[scale_x, -slant * scale_y], [zero, scale_y]]).transpose(2, 0, 1)
    half = (np.abs(to_canvas) @ extent[:, :, None])[..., 0] / 2
    fit = np.minimum(1, (k / 2) / half.max(1))[:, None]  # never over the edge
    to_canvas, half = to_canvas * fit[:, :, None], half * fit
    centre = k / 2 + rng.uniform(-1, 1, (count, 2)) * (k / 2 - half)
    to_glyph = np.linalg.inv(to_canvas)
    offset = extent / 2 - (to_glyph @ centre[:, :, None])[..., 0]
    affine = np.concatenate([to_glyph, offset[:, :, None]], 2).reshape(count, 6).tolist()
    images = np.empty((count, 1, size, size), np.uint8)
    for i in range(count):
        images[i, 0] = np.asarray(glyphs[which[i]].transform((k, k), Image.AFFINE, affine[i], Image.BILINEAR).reduce(k // size))
    return images, labels


def _named(name, root, size, seed):
    """Cached (images, labels, splits, names) of a named set of pictures."""
    import numpy as np
    from PIL import Image
    if name == "digits":
        def make(folder):
            images, labels = _draw_digits(size or 16, seed)
            _store(folder, images, labels, _hold_out(len(labels)), DIGITS)
        return _cached(root, f"digits-{_key(size or 16, seed)}", make)

    if name == "stacked":  # held-out digits make held-out stacks
        def make(folder):
            digits, labels, splits, _ = _named("digits", root, size, seed)
            rng, parts = np.random.default_rng(seed), []
            for test, count in ((0, 50_000), (1, 5_000)):
                rows = np.flatnonzero(splits == test)[rng.integers((splits == test).sum(), size=(count, 3))]
                parts.append((digits[:, 0].numpy()[rows], labels.numpy()[rows] @ [100, 10, 1], np.full(count, test)))
            _store(folder, *map(np.concatenate, zip(*parts)), [f"{i:03}" for i in range(1000)])
        return _cached(root, f"stacked-{_key(size or 16, seed)}", make)

    files = _files(name, root)

    def make(folder):
        read = _read_cifar if name == "cifar10" else _read_idx
        images, labels, splits = read(files)
        if size and size != images.shape[-1]:
            print(f"resizing {name} to {size} x {size}", file=sys.stderr)
            images = np.stack([_pixels(Image.fromarray(i.transpose(1, 2, 0).squeeze()), size, len(i) == 1) for i in images])
        _store(folder, images, labels, splits, dict(mnist=DIGITS, cifar10=CIFAR).get(name, FASHION))
    return _cached(root, f"{name}-{_key(size, _stamp(files, root))}", make)


def _swirl(split, seed):
    """1,024 points of a spiral of one and a half turns, with a little noise, in [-1, 1]; the test split is another draw of it."""
    g = torch.Generator().manual_seed(2 * seed + (split == "test"))
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(1024, generator=g))
    radius = angle / (4.5 * math.pi) * 0.95
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + 0.01 * torch.randn(1024, 2, generator=g)
    return points.clamp(-1, 1), torch.full((1024,), -1)


def _gaussians(split, seed):
    """20,000 points (2,000 held out) of the 25 Gaussians."""
    g = torch.Generator().manual_seed(2 * seed + (split == "test"))
    n = 2_000 if split == "test" else 20_000
    means = GAUSSIANS_MEANS[torch.randint(25, (n,), generator=g)]
    return means + GAUSSIANS_SIGMA * torch.randn(n, 2, generator=g), torch.full((n,), -1)


# ------------------------------------------------------------------------------------------------- fetched and official


def _files(name, root):
    """The official files of a named set, from root or root/name, fetched if they are in neither."""
    _, digests, _ = SOURCES[name]
    found, folders = [], (root / name, root, root / name / "cifar-10-batches-bin", root / "cifar-10-batches-bin")
    for folder in folders if name == "cifar10" else ():
        if (folder / BATCHES[-1]).is_file():
            return [folder / batch for batch in BATCHES]
    labels = next((f for f in (root / IDX[1], root / f"{IDX[1]}.gz") if f.is_file()), None)
    if labels and _head(labels)[8:] == OTHERS_LABELS.get(name):
        folders = folders[:1]  # MNIST and Fashion-MNIST share their files' names: those in root itself are the other's
    for stem in digests:
        ways = [f"{stem}.tar.gz"] if name == "cifar10" else [stem, f"{stem}.gz", stem.replace("-idx", ".idx")]
        places = [folder / way for folder in folders[:2] for way in ways]
        found.append(next((p for p in places if p.is_file()), None) or _fetch(name, stem, root / name))
    return found


def _head(file):
    """The first 16 bytes of a file, raw or gzip."""
    try:
        with gzip.open(file) as f:
            return f.read(16)
    except (OSError, EOFError, zlib.error):
        return file.read_bytes()[:16]


def _fetch(name, stem, folder):
    """Download one file: a temporary name, checked against its digest, then its own name; the next address where one fails."""
    from tqdm import tqdm
    addresses, digests, what = SOURCES[name]
    file = f"{stem}.tar.gz" if name == "cifar10" else f"{stem}.gz"
    folder.mkdir(parents=True, exist_ok=True)
    temporary, faults = folder / f".{os.getpid()}-{file}", []
    try:
        for address in addresses:
            try:
                with urllib.request.urlopen(address + file, timeout=30) as source, open(temporary, "wb") as out:
                    total = int(source.headers.get("Content-Length") or 0)
                    with tqdm(total=total or None, unit="B", unit_scale=True, desc=f"fetching {file}", leave=False,
                              disable=None) as bar:
                        while block := source.read(1 << 18):
                            out.write(block)
                            bar.update(len(block))
                    if total and out.tell() != total:
                        raise ValueError(f"cut at {out.tell()} of {total} bytes")
                content = temporary.read_bytes()
                content = gzip.decompress(content) if what == "unpacked" else content
                if (hashlib.md5 if len(digests[stem]) == 32 else hashlib.sha256)(content).hexdigest() != digests[stem]:
                    raise ValueError("its digest is wrong")
                os.replace(temporary, folder / file)
                return folder / file
            except (OSError, ValueError, EOFError, zlib.error, http.client.HTTPException) as fault:
                faults.append(f"{address + file}: {' '.join(str(fault).split())}")  # of one line
    finally:
        temporary.unlink(missing_ok=True)
    raise ValueError(f"could not fetch {file} ({'; '.join(faults)}): put the file into {folder} yourself")


def _read_idx(files):
    """Images (70000, 1, 32, 32), padded with zeros from 28 x 28, labels and splits of the four IDX files."""
    import numpy as np
    arrays = []
    for file in files:
        content, axes = file.read_bytes(), 3 if "images" in file.name else 1
        try:
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        except (OSError, EOFError, zlib.error):
            content = b""
        shape = np.frombuffer(content[4:4 + 4 * axes], ">u4").tolist() if len(content) >= 4 + 4 * axes else [0]
        whole = content[:4] == bytes([0, 0, 8, axes]) and len(content) == 4 + 4 * axes + math.prod(shape) and 0 not in shape
        if not whole or shape[1:] not in ([], [28, 28]):
            raise ValueError(f"{file} is not an IDX file of 28 x 28 pictures or their labels: delete it, and it is fetched again")
        arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape))
    (train, test), (train_labels, test_labels) = arrays[::2], arrays[1::2]
    if len(train) != len(train_labels) or len(test) != len(test_labels) or max(train_labels.max(), test_labels.max()) > 9:
        raise ValueError(f"{files[0].parent}: images and labels do not belong together: delete them, and they are fetched again")
    images = np.pad(np.concatenate([train, test])[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))
    return images, np.concatenate([train_labels, test_labels]).astype(np.int64), np.arange(len(images)) >= len(train)


def _read_cifar(files):
    """Images (60000, 3, 32, 32), labels and splits, from the binary archive or the six files in it. Nothing is unpacked to disk."""
    import numpy as np
    found = _walk(files[0]) if len(files) == 1 else ((f.name, 1, f.read_bytes) for f in files if f.is_file())
    try:
        parts = {n: read() for name, size, read in found if (n := PurePosixPath(name).name) in BATCHES and 0 < size < LARGEST}
    except (tarfile.TarError, OSError, EOFError, TypeError):
        raise ValueError(f"{files[0]} is damaged: delete it, and it is fetched again") from None
    for n in BATCHES:
        if not parts.get(n) or len(parts[n]) % 3073:
            raise ValueError(f"{files[0]}: {n} is missing, or not whole records of 3,073 bytes: delete it, and it is fetched again")
    records = np.concatenate([np.frombuffer(parts[n], np.uint8).reshape(-1, 3073) for n in BATCHES])
    if records[:, 0].max() > 9:
        raise ValueError(f"{files[0]} holds labels above 9: it is not CIFAR-10's binary version")
    test = np.arange(len(records)) >= len(records) - len(parts[BATCHES[-1]]) // 3073
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64), test


# ------------------------------------------------------------------------------------------- folders and archives


class _Member(tarfile.TarInfo):
    """A tar entry; a damaged header, or none, is an error, where tarfile takes it for the end."""
    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError:
            raise tarfile.ReadError(f"cut or damaged at byte {archive.offset}") from None


def _walk(path):
    """(name, size in bytes, open function) of every file in a folder or archive, in a fixed order; links in archives have no size.

    Archives are read as streams, so their files must be read at once, and nothing in them ever touches the disk.
    """
    if path.is_dir():
        seen = set()  # linked folders are followed, each once: links may make a ring
        for folder, inner, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            inner[:] = [] if real in seen else sorted(inner)
            for f in () if real in seen else sorted(files):
                file = Path(folder) / f
                yield file.relative_to(path).as_posix(), file.stat().st_size if file.exists() else 0, file.read_bytes
            seen.add(real)
    elif path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, lambda: archive.read(info)
    else:
        with tarfile.open(path, "r|*", tarinfo=_Member) as archive:
            for member in archive:
                if not member.isdir():
                    yield member.name, member.size if member.isfile() else 0, lambda: archive.extractfile(member).read()


def _is_picture(name):
    """Has this file a picture's ending, and is no folder of it hidden?"""
    from PIL import Image
    parts = [p for p in PurePosixPath(name).parts if p not in ("..", ".", "/")]
    return Image.registered_extensions().get(PurePosixPath(name).suffix.lower()) in FORMATS and \
        not any(p.startswith((".", "__MACOSX")) for p in parts)


def _open(file):
    from PIL import Image
    Image.init()
    return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])  # whatever its name says


def _pictures(path, text):
    """(parts of the name, opened PIL picture or None where it cannot be read) of every file that has a picture's ending."""
    from PIL import Image
    from tqdm import tqdm
    with warnings.catch_warnings(), tqdm(desc=text, unit=" pictures", leave=False, disable=None) as bar:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name, size, read in _walk(path):
            if not _is_picture(name):
                continue
            bar.update()
            try:
                picture = _open(io.BytesIO(read())) if 0 < size < LARGEST else None
            except tarfile.TarError:
                raise
            except Exception:  # damaged files raise anything
                picture = None
            yield [p for p in PurePosixPath(name).parts if p not in ("..", ".", "/")], picture


def _pixels(picture, size, grey):
    """A PIL picture of any mode as uint8 (C, size, size): upright, over white where transparent, its centre square, resized."""
    import numpy as np
    from PIL import Image, ImageOps
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits or more to 8
        values = np.asarray(picture).astype(np.float64)
        scale = 1 / 257 if picture.mode != "F" else 255 if values.max() <= 1 else 1
        picture = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if grey else "RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.BOX if size < side else Image.BICUBIC)
    array = np.asarray(picture)
    return array[None] if grey else array.transpose(2, 0, 1)


def _path(path, root, size):
    """Cached (images, labels, splits, names) of a folder or archive of pictures."""
    path = path.resolve()
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder, nor digits, stacked, swirl, gaussians, " + ", ".join(SOURCES))
    if path.is_file() and not path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")):
        raise ValueError(f"--data {path}: not a folder, .zip, .tar, .tar.gz or .tar.xz")
    # pictures alone: the cache itself may lie in the folder
    files = [path / name for name, *_ in _walk(path) if _is_picture(name)] if path.is_dir() else [path]
    key = _key(str(path), size, _stamp(files, path))

    def make(folder):
        try:
            _cache_path(path, folder, size)
        except (OSError, ValueError):
            raise
        except Exception as fault:  # tarfile and zipfile raise many things
            raise ValueError(f"--data {path}: this archive is damaged ({fault})") from None
    return _cached(root, f"{path.name.split('.')[0]}-{key}", make)


def _cache_path(path, folder, size):
    """Read the source twice: the headers, to settle size and channels, and then the pixels, straight into the cache."""
    import numpy as np
    sides, grey = set(), True
    for _, picture in _pictures(path, f"looking through {path.name}"):
        if picture is not None:
            sides |= set(picture.size)
            grey &= picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")
    size = size or (sides.pop() if len(sides) == 1 else 64)
    if size < 4:
        raise ValueError(f"--data {path}: pictures of {size} pixels are too small; give --size")
    rows, unread = [], []
    with open(folder / "raw", "wb") as raw:
        for parts, picture in _pictures(path, f"reading {path.name}"):
            try:
                pixels = _pixels(picture, size, grey).tobytes()
            except Exception:  # decoders of damaged pictures raise anything, and None has no pixels
                unread.append("/".join(parts))
            else:
                raw.write(pixels)
                rows.append(parts)
    if not rows:
        raise ValueError(f"--data {path}: no picture in it can be read")
    if unread:
        print(f"{len(unread)} unreadable pictures left out, the first is {unread[0]}", file=sys.stderr)

    while len({p[0] for p in rows}) == 1 and rows[0][0] not in ("train", "test") and (
            all(len(p) > 2 for p in rows) or any(len(p) > 2 and p[1] in ("train", "test") for p in rows)):
        rows = [p[1:] for p in rows]  # a folder around it all
    given = [p[0] if len(p) > 1 and p[0] in ("train", "test") else None for p in rows]
    own = [p[-2] if len(p) > 1 + (split is not None) else None for p, split in zip(rows, given)]
    names = sorted(set(own) - {None})
    number = {c: i for i, c in enumerate(names)}
    labels = np.array([number.get(c, -1) for c in own])
    splits = np.array([split == "test" for split in given]) if "test" in given else _hold_out(len(rows))
    _store(folder, np.memmap(folder / "raw", np.uint8, "r", shape=(len(rows), 1 if grey else 3, size, size)), labels, splits, names)
    (folder / "raw").unlink()


def read_pictures(paths, shape):
    """Picture files as (N, C, H, W) in [-1, 1], cropped and resized to shape (C, H, H) as a data set's are."""
    pictures = []
    for path in paths:
        try:
            with _open(path) as picture:
                pictures.append(torch.from_numpy(_pixels(picture, shape[-1], shape[0] == 1).copy()))
        except Exception:  # as above
            raise ValueError(f"{path} is not a picture that can be read") from None
    return torch.stack(pictures).float().div(127.5).sub(1)
