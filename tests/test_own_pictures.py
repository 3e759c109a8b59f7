"""People's own pictures: read right, said aloud, known again, trained by default on a laptop."""
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ddim
from common import data, files, flags, metrics, progress, runs
from conftest import ROOT, SMALL, run
from test_data import folder

TINY = [*SMALL["ddim"], "--iters", "10"]


def picture(value=0, size=(8, 8), form="png", **options):
    """The bytes of a picture of one colour."""
    out = io.BytesIO()
    value = value if isinstance(value, tuple) else (value,) * 3
    Image.new("RGB", size, value).save(out, form, **options)
    return out.getvalue()


def zipped(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def both(source, root, **more):
    return [data.load(str(source), root, split=split, **more) for split in ("train", "test")]


# ------------------------------------------------------------------------------------ what is read
def test_what_is_left_out_is_told_by_kind(tmp_path):
    contents = {f"cat/{i}.png": picture(i) for i in range(3)} | {f"dog/{i}.png": picture(99 + i)
                                                                 for i in range(2)}
    contents |= {"cat/a.heic": b"h", "cat/b.HEIC": b"h", "raw.cr2": b"r", "noname": picture(1),
                 "dog/bad.jpg": b"no", "dog/none.png": b"", "Thumbs.db": b"x", ".hidden": b"x"}
    train, test = both(folder(tmp_path / "s", contents), tmp_path / "root")
    line = train.told()
    assert len(train) + len(test) == 5 and train.held_out == len(test)
    assert f"{len(train)} pictures to train with, {len(test)} held out, 3 x 8 x 8" in line
    counts = train.labels.bincount(minlength=2).tolist()
    assert f"cat {counts[0]}, dog {counts[1]}" in line
    left = line.partition("left out: ")[2]
    for words in ("2 .heic", "1 .cr2", "1 without an ending", "1 damaged", "1 empty",
                  "the first is dog/bad.jpg"):
        assert words in left
    assert "thumbs" not in left and "hidden" not in left


def test_what_is_kept_beside_pictures_is_not_told_as_left_out(tmp_path):
    """The data root may lie among them, or be their folder."""
    for root in ("data", "."):
        source = folder(tmp_path / root / "s", {"a/1.png": picture(1), "a/2.png": picture(2)})
        folder(source / root, {"classifier-x.pt": b"", "features-x.pt": b"",
                               "cached/other/labels.npy": b""})
        assert data.load(source, source / root).left_out == {}
        folder(source, {"a/3.heic": b"", "a/4.png": picture(4)})
        assert data.load(source, source / root).left_out == {".heic": 1}


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True,
                    reason="root opens every folder")
def test_a_folder_that_cannot_be_opened_is_told(tmp_path):
    source = folder(tmp_path / "s", {"cat/1.png": picture(1), "dog/2.png": picture(2)})
    (source / "dog").chmod(0)
    try:
        train, _ = both(source, tmp_path / "root")
    finally:
        (source / "dog").chmod(0o700)
    assert "dog, a folder that cannot be opened" in train.told()


def test_the_walk_tells_what_it_could_not_open(tmp_path, monkeypatch):
    """As above, also for root: the walk itself says so."""
    source = folder(tmp_path / "s", {"cat/1.png": picture(1), "dog/2.png": picture(2)})
    scan = os.scandir

    def shut(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", shut)
    train = data.load(source, tmp_path / "root")
    assert train.classes == ["cat"]
    assert train.left_out == {"in dog, a folder that cannot be opened": 1}


def names(*words, start=0):
    return {word: picture(start + i) for i, word in enumerate(words)}


@pytest.mark.parametrize("words,classes,trained,held", [
    # bird is not trained, so it is not judged by either
    (("train/cat/1", "train/dog/2", "test/cat/3", "test/bird/4"), ["cat", "dog"], 2, 1),
    # locomotives
    (("car/1", "car/2", "plane/3", "train/4", "train/5"), ["car", "plane", "train"], 5, 0),
    (("Train/cat/1", "Train/dog/2", "Test/cat/3"), ["cat", "dog"], 2, 1),
    (("training/cat/1", "validation/cat/2"), ["cat"], 1, 1),
    (("TRAIN/cat/1", "val/cat/2", "test/cat/3"), ["cat"], 1, 2),
    (("train/cat/1", "valid/cat/2"), ["cat"], 1, 1),
    (("set/train/cat/1", "set/Valid/cat/2"), ["cat"], 1, 1),
    (("train/cat/1", "test/cat/2", "docs/3"), ["cat"], 1, 1),
    (("cat/1", "dog/2", "val/cat/3"), ["cat", "dog"], 2, 1)])
def test_splits_and_classes_as_people_name_them(tmp_path, words, classes, trained, held):
    source = folder(tmp_path / "s", names(*(f"{word}.png" for word in words)))
    train = data.load(source, tmp_path / "root")
    assert train.classes == classes
    if held:
        test = data.load(source, tmp_path / "root", split="test")
        assert (len(train), len(test), test.classes) == (trained, held, classes)
    else:
        assert len(train) + train.held_out == trained
    missing = len(words) - len(train) - train.held_out
    assert sum(n for why, n in train.left_out.items()) == missing


def test_a_zip_of_windows_has_its_folders(tmp_path):
    """The name is written with backslashes, as some programs there do."""
    contents = names("train/cat/1.png", "train/dog/2.png", "test/dog/3.png")
    source = zipped(tmp_path / "s.zip", contents)
    raw = source.read_bytes()
    for name in contents:
        raw = raw.replace(name.encode(), name.replace("/", "\\").encode())
    source.write_bytes(raw)
    train, test = both(source, tmp_path / "root")
    assert train.classes == ["cat", "dog"] and (len(train), len(test)) == (2, 1)


@pytest.mark.parametrize("offset,value,why", [
    (6, 1, "3 encrypted"), (8, 99, "3 compressed by method 99 of zip, which Python has not")])
def test_why_a_zip_cannot_be_read(tmp_path, offset, value, why):
    source = zipped(tmp_path / "s.zip", names("1.png", "2.png", "3.png"))
    raw = bytearray(source.read_bytes())
    for mark, shift in ((b"PK\3\4", 0), (b"PK\1\2", 2)):  # each entry, and the directory's of it
        at = raw.find(mark)
        while at >= 0:
            raw[at + offset + shift] = value
            at = raw.find(mark, at + 4)
    source.write_bytes(raw)
    with pytest.raises(ValueError, match="no picture in it can be read.*" + why):
        data.load(str(source), tmp_path / "root")


# ---------------------------------------------------------------------------------- odd pictures
def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png, kind, body):
    """A PNG with one more chunk, after its head."""
    return png[:33] + chunk(kind, body) + png[33:]


def noisy():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.mark.parametrize("what", ("junk", "headerless", "profile", "jpeg"))
def test_pictures_with_broken_exif_are_taken_as_they_lie(tmp_path, what):
    out = io.BytesIO()
    noisy().save(out, "jpeg" if what == "jpeg" else "png", **dict(exif=b"Exif\0\0MM\0*\0\0\0\x08"
                 b"\0\1\x01\x12\0\2\0\0\0\xff\0\0\xff\xff") if what == "jpeg" else {})
    content = out.getvalue()
    if what == "junk":
        content = with_chunk(content, b"eXIf", b"\xff" * 40)
    elif what == "headerless":
        content = with_chunk(content, b"eXIf", struct.pack("<HHHI", 1, 0x112, 3, 1) + b"\6")
    elif what == "profile":
        content = with_chunk(content, b"tEXt", b"Raw profile type exif\0\nexif\n  9\nnot hex")
    train = data.load(folder(tmp_path / "s", {f"1.{what}.png": content}), tmp_path / "root")
    assert len(train) == 1 and not train.left_out
    expected = torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).copy())
    assert torch.equal(train.images[0], expected.permute(2, 0, 1))


def test_sixteen_bit_grey_keeps_its_transparent_colour(tmp_path):
    values = np.full((8, 8), 30_000, np.uint16)
    values[:, :4] = 1000
    out = io.BytesIO()
    Image.fromarray(values).save(out, "png")
    content = with_chunk(out.getvalue(), b"tRNS", struct.pack(">H", 1000))
    train = data.load(folder(tmp_path / "s", {"1.png": content}), tmp_path / "root")
    assert (train.images[0, 0, :, :4] == 255).all()  # white, over which it lies
    assert (train.images[0, 0, :, 4:] == round(30_000 / 257)).all()


@pytest.mark.parametrize("side,form", [(9600, "jpeg"), (13_500, "png")])
def test_large_pictures_are_one_behaviour(tmp_path, side, form):
    """92 megapixels are read; 182 are refused, by their right name, everywhere."""
    mode = "L" if form == "jpeg" else "1"
    large = Image.new(mode, (side, side), 0)
    ImageDraw.Draw(large).rectangle((0, 0, side // 2, side), fill=255)
    out = io.BytesIO()
    large.save(out, form)
    source = folder(tmp_path / "s", {f"1.{form}": out.getvalue(), "2.png": picture(7)})
    path = source / f"1.{form}"
    if form == "jpeg":
        train, test = both(source, tmp_path / "root", size=8)
        assert len(train) + len(test) == 2 and not train.left_out
        x = data.read_pictures([path], (1, 8, 8))[0, 0]
        assert (x[:, :4] > 0.9).all() and (x[:, 4:] < -0.9).all()
    else:
        assert data.load(source, tmp_path / "root", 8).left_out == {"of 182 megapixels": 1}
        with pytest.raises(ValueError, match="of 182 megapixels"):
            data.read_pictures([path], (1, 8, 8))


@pytest.mark.parametrize("sides,most,side", [
    ((28, 28), 32, 28), ((32, 32), 32, 32), ((48, 48), 32, 32), ((48, 48), 64, 48),
    ((200, 200), 64, 64), ((20, 40), 32, 32), ((20, 40), 64, 64)])
def test_the_default_side_is_capped(tmp_path, sides, most, side):
    source = folder(tmp_path / "s", {f"{i}.png": picture(i, (s, s)) for i, s in enumerate(sides)})
    assert data.load(source, tmp_path / "root", most=most).shape == (3, side, side)


# ------------------------------------------------------------------------------ which data it is
def test_names_keep_their_dots():
    for path, name in (("a/photos.v1", "photos.v1"), ("photos.v1.zip", "photos.v1"),
                       ("x.tar.gz", "x"), ("x.TGZ", "x"), ("x.y.tar.xz", "x.y"),
                       ("digits", "digits")):
        assert data.title(path) == name


def many(start, n=20, **more):
    return {f"{'ab'[i % 2]}/{i}.png": picture(start + i) for i in range(n)} | more


def test_a_set_is_known_by_its_content(tmp_path):
    root = tmp_path / "root"
    first = data.load(folder(tmp_path / "one", many(0)), root)
    known = first.content()
    assert len(known["smallest"]) == known["pictures"] == 20 and len(first) == 18
    assert data.load(tmp_path / "one", root, split="test").content() == known
    assert json.loads(json.dumps(known)) == known
    turned = dict(reversed(many(0).items()))
    for moved in (folder(tmp_path / "two", many(0)), zipped(tmp_path / "three.zip", turned)):
        again = data.load(moved, root)
        assert data.changed(known, again) == ""
        # and as many are held out, the same ones, in the same order
        assert torch.equal(again.images, first.images)
        assert torch.equal(again.labels, first.labels)
    other = data.load(folder(tmp_path / "four", many(100)), root)
    assert data.changed(known, other) == "other data" and data.changed(None, other) == ""
    new = {"a/new.png": picture(200), "b/new.png": picture(201)}
    more = data.load(folder(tmp_path / "five", many(0, **new)), root)
    assert data.changed(known, more) == "the same data before 2 pictures were added"
    contents = many(0)
    contents["b/0.png"] = contents.pop("a/0.png")  # the same pictures, one of the other class
    assert data.changed(known, data.load(folder(tmp_path / "six", contents), root)) == "other data"
    assert data.changed(known, data.load(folder(tmp_path / "seven", many(0, 19)), root))
    assert data.load("swirl").content() is None


def test_another_set_of_the_same_name_is_refused(tmp_path):
    """Every downloaded set is called archive.zip."""
    a, b = (zipped(tmp_path / name / "archive.zip", many(start)) for name, start in
            (("a", 0), ("b", 100)))
    done = run(tmp_path, "ddim", "--train", "--data", a, *TINY)
    assert "18 pictures to train with, 2 held out, 3 x 8 x 8; classes a 9, b 9" in done.stderr
    for act in (["--train", *TINY], ["--train", *TINY[:-1], "20"]):
        told = run(tmp_path, "ddim", *act, "--data", b, code=2).stderr
        assert "was trained with other data (now in" in told and told.count("\n") == 1
    for act in (["--evaluate", "--n", "8"], ["--encode"]):  # which reads held-out pictures
        told = run(tmp_path, "ddim", *act, "--data", b, code=2).stderr
        assert "was trained with other data" in told
    metrics_of = tmp_path / "runs" / "ddim-archive" / "metrics.csv"
    assert len(metrics_of.read_text().splitlines()) == 2  # nothing went on
    zipped(a, many(0, **{"a/new.png": picture(200)}))
    told = run(tmp_path, "ddim", "--train", "--data", a, *TINY, code=2).stderr
    assert "the same data before 1 pictures were added" in told and "--init" in told
    moved = zipped(tmp_path / "renamed.zip", many(0))
    where = ["--run", "runs/ddim-archive", "--data", moved]
    assert "already trained" in run(tmp_path, "ddim", "--train", *where, *TINY).stdout
    run(tmp_path, "ddim", "--sample", "--n", "2", "--steps", "2", *where)


# ------------------------------------------------------------------------------ without a GPU
@pytest.mark.parametrize("script", sorted(SMALL))
def test_without_a_gpu_a_folder_gets_what_a_laptop_trains(script, monkeypatch, tmp_path):
    module = __import__(script)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)

    def laid(**given):
        return flags.settings(script, module.FLAGS, module.RECIPES, **given)

    for name in ("mine", "mnist", "cifar10"):
        c = laid(data=name, device="cpu")
        widest = 48 if script == "ldm" else 32  # on a map of half the side
        assert (c.attention, c.blocks) == ((), 1) and c.width <= widest and c.batch <= 64
        assert 0 < c.minutes <= 30 and flags.most(c) == 32
        told = flags.full_recipe(c)
        assert "True" not in told and "False" not in told
        assert f"width {c.width}" in told and "--width " in told and "--minutes 0" in told
        monkeypatch.setattr(flags, "_without_gpu", lambda given: False)
        whole = laid(data=name)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert whole.width > 32 and whole.attention and not whole.minutes
        assert flags.full_recipe(whole) == ""
        # what the line says is the recipe: given, it leaves nothing to say
        given = told.partition("full recipe: ")[2].replace("''", "").split("--")[1:]
        values = {}
        for word in given:
            flag, _, value = word.strip().partition(" ")
            field = c.fields[flag.replace("-", "_").removeprefix("no_")]
            values[field.name] = flags._read(field, value) if value else not flag.startswith("no-")
        again = laid(data=name, device="cpu", **values)
        assert flags.full_recipe(again) == ""
        for field in values:
            assert getattr(again, field) == getattr(whole, field)
    points = () if script == "ldm" else ("swirl", "gaussians")
    for name in ("digits", "stacked", *points):  # made for a laptop
        assert flags.full_recipe(laid(data=name, device="cpu")) == ""


def test_a_run_that_goes_on_elsewhere_keeps_its_settings(tmp_path, monkeypatch):
    """Begun where there was a GPU: the recipe of a laptop does not ask for another network."""
    folder(tmp_path / "mine", {f"{i}.png": picture(i, (40, 40)) for i in range(20)})
    monkeypatch.chdir(tmp_path)
    there = ["--width", "8", "--multipliers", "1,2", "--attention", "4", "--heads", "2",
             "--batch", "16", "--lr", "2e-3", "--size", "8", "--ema", "0.9"]
    run(tmp_path, "ddim", "--train", "--data", "mine", *there, "--iters", "10")
    run(tmp_path, "ddim", "--train", "--data", "mine", "--heads", "2", "--iters", "20")
    saved = torch.load("runs/ddim-mine/checkpoint.pt", weights_only=True)
    assert saved["step"] == 20 and saved["config"]["width"] == 8
    assert saved["data"]["shape"] == [3, 8, 8]
    # trained for longer than a laptop's minutes, by the whole recipe: it is not at its end
    saved["config"] |= dict(iters=100_000, minutes=0.0)
    torch.save(saved | dict(seconds=9999.0), "runs/ddim-mine/checkpoint.pt")
    c = flags.settings("ddim", ddim.FLAGS, ddim.RECIPES, data="mine", device="cpu")
    assert (c.iters, c.minutes, c.width) == (100_000, 0, 8)
    c = flags.settings("ddim", ddim.FLAGS, ddim.RECIPES, data="mine", device="cpu", minutes=3)
    assert c.minutes == 3


def test_a_class_s_only_picture_is_trained(tmp_path):
    """Whichever of the tenth it would be held out by."""
    for n in range(12, 19):
        contents = {f"{i}/{i}.png": picture(i) for i in range(n)} | {"0/a.png": picture(99)}
        train, test = both(folder(tmp_path / str(n), contents), tmp_path / "root")
        assert len(train.labels.unique()) == n == len(train.classes) and len(test) == 1


def test_a_run_of_some_classes_is_judged_by_them(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "UPDATES", {1: 5, 3: 5})
    folder(tmp_path / "mine", {f"{'abc'[i % 3]}/{i}.png": picture(4 * i) for i in range(60)}
           | {f"{i}.png": picture(100 + i) for i in range(9)})
    for more in (["--classes", "a,b"], []):
        where = ["--data", "mine", "--run", f"runs/{len(more)}"]
        run(tmp_path, "ddim", "--train", *where, *more, *TINY)
        run(tmp_path, "ddim", "--evaluate", *where, "--n", "8", "--steps", "2")


def test_a_pace_that_reaches_too_few_updates_is_told(monkeypatch, tmp_path, capsys):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    c = SimpleNamespace(shape=(3, 64, 64), minutes=1, iters=1000, width=64, batch=64)
    run_ = runs.Run.__new__(runs.Run)
    run_.c, run_.limit, run_.step, run_.seconds = c, 60, 0, 0.0
    run_.share, run_.only = 1.0, ()

    def paced(seconds, updates):
        run_.step, run_.seconds = 0, 0.0
        for i in range(updates):
            run_.step, run_.seconds = i + 1, (i + 1) * seconds
            if run_._pace(0, 0.0):
                break
        return run_.step, " ".join(capsys.readouterr().err.split())

    step, told = paced(4.0, 20)
    assert step == 3 and "at 4.0 s each only 15 updates fit into 1 minutes" in told
    assert "--minutes 14" in told and "--width 32 or --batch 32 or --size 32" in told
    step, told = paced(0.1, 20)
    assert step == 10 and told == ""
    assert paced(0.4, 20)[0] == 10
    # a stage that has half of the minutes, and a width of its own
    run_.share, run_.only, c.width_ae, run_.limit = 0.5, ("width_ae", "batch"), 32, 30
    _, told = paced(4.0, 20)
    assert "only 7 updates fit into 0.5 minutes" in told and "--minutes 27" in told
    assert "--width-ae 16 or --batch 32" in told and "--width 32" not in told


def test_the_closing_sheet_takes_a_fifth_of_the_time_at_most(tmp_path, capsys):
    run_ = runs.Run.__new__(runs.Run)
    run_.c = SimpleNamespace(shape=(3, 8, 8), batch=10)
    run_.seconds, run_.step, run_.began = 100.0, 50, 0
    for cost, evaluations, n in ((0.001, 50, 64), (0.01, 50, 36), (0.1, 50, 4), (9, 50, 4)):
        run_.cost = cost
        assert run_.closing(evaluations) == n
        told = capsys.readouterr().err
        assert (f"{n} samples instead of 64" in told) == (n < 64)
        assert n == 4 or n * evaluations * cost <= 20
    run_.cost = None  # 2 s an update of ten samples, three evaluations: 1/15 s each
    assert run_.closing(10) == 16
    run_.seconds, run_.step, run_.cost = 0.5, 5, 0.001  # three seconds are always there
    assert run_.closing(40) == 64


def test_long_work_writes_lines_into_a_pipe(capsys, monkeypatch):
    for _ in progress.progress(range(3), "quick"):
        pass
    assert capsys.readouterr().err == ""
    with progress.progress(total=3, text="kept", leave=True) as bar:
        bar.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("kept") and "\r" not in line for line in lines)
    assert "3/3" in lines[-1]


@pytest.mark.parametrize("error", ("torch.OutOfMemoryError('x')", "MemoryError()",
                                   "RuntimeError(\"DefaultCPUAllocator: can't allocate memory\")"))
def test_no_memory_is_one_line(error):
    code = ("import sys, torch; from common import files; files.program = 'ddim.py'; "
            f"sys.excepthook = files.excepthook; raise {error}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--size" in done.stderr and "--batch" in done.stderr


def test_other_errors_keep_their_traceback():
    code = ("import sys; from common import files; sys.excepthook = files.excepthook; "
            "raise RuntimeError('a fault')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert files.excepthook is not None


def test_parse_asks_for_that_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ddim.py", "--train"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    flags.parse("ddim", ddim.FLAGS, ddim.RECIPES, "")
    assert sys.excepthook is files.excepthook


# ------------------------------------------------------------------------------------- judging
def colours(root, n=200):
    """A folder of red and blue pictures, which any classifier tells apart."""
    rng = np.random.default_rng(0)
    contents = {}
    for i in range(n):
        kind = i % 2
        value = [int(v) for v in rng.integers(0, 60, 3)]
        value[2 * kind] = int(rng.integers(180, 255))
        contents[f"{'rb'[kind]}/{i}.png"] = picture(tuple(value))
    return folder(root, contents)


def test_the_classifier_ends_where_held_out_accuracy_does_not_rise(tmp_path, monkeypatch, capsys):
    source = str(colours(tmp_path / "s"))
    monkeypatch.setattr(metrics, "CHECK", 40)
    monkeypatch.setattr(metrics, "COOL", 30)
    _, accuracy, _ = metrics.classifier(source, tmp_path / "root")
    told = capsys.readouterr().err
    assert accuracy == 1 and f"after {metrics.CHECK + metrics.COOL} updates" in told
    assert "is trained once, for at most 1500 updates" in told


@pytest.mark.parametrize("looks,more", [
    ([], True), ([0.5], True), ([0.5, 0.6, 0.6, 0.6], True), ([0.5, 0.6, 0.6, 0.6, 0.6], False),
    ([0.7, 0.6, 0.6, 0.6], False), ([0.2, 0.3, 0.4, 0.5, 0.6], True), ([0.9, 1.0], False)])
def test_when_it_may_still_rise(looks, more):
    assert metrics._risen(looks) is more


def test_an_interrupted_classifier_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "CHECK", 10)
    monkeypatch.setattr(metrics, "COOL", 12)
    source = str(colours(tmp_path / "s"))
    whole, *_ = metrics.classifier(source, tmp_path / "1")
    monkeypatch.setattr(metrics, "KEEP_EVERY", 0.0)
    keep, kept = metrics._keep, []

    def interrupted(path, state):
        keep(path, state)
        if "begun" in path.name and len(kept) < 17:
            kept.append(state["step"])
            if state["step"] == 17:
                raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "_keep", interrupted)
    # the first load of root 2 makes its own cache of the pictures
    with pytest.raises(KeyboardInterrupt):
        metrics.classifier(source, tmp_path / "2")
    monkeypatch.setattr(metrics, "_keep", keep)
    monkeypatch.setattr(metrics, "KEEP_EVERY", 1e9)
    capsys.readouterr()
    again, *_ = metrics.classifier(source, tmp_path / "2")
    for a, b in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)
    assert kept[-1] == 17 and not list((tmp_path / "2").glob(".classifier*"))


@pytest.mark.parametrize("n,there,lacks", [
    (19, {"fcd"}, "no floor: 1 picture is held out"), (6, {"fcd"}, "no precision"),
    (40, {"fcd", "fcd_floor", "precision"}, "")])
def test_few_pictures_are_judged_by_what_can_be_computed(tmp_path, monkeypatch, n, there, lacks):
    monkeypatch.setattr(metrics, "UPDATES", {1: 5, 3: 5})
    folder(tmp_path / "few", {f"{i}.png": picture(10 * i) for i in range(n)})
    run(tmp_path, "ddim", "--train", "--data", "few", *TINY)
    done = run(tmp_path, "ddim", "--evaluate", "--data", "few", "--n", "8", "--steps", "2")
    result = json.loads((tmp_path / "runs/ddim-few/evaluation.json").read_text())
    assert {"fcd", "fcd_floor", "precision"} & result.keys() == there | (
        {"precision"} if n == 19 else set())
    assert lacks in done.stderr and "FCD" in done.stdout


def test_what_cannot_be_judged_is_told_before_any_work(tmp_path, monkeypatch):
    folder(tmp_path / "one", {"1.png": picture(1)})
    run(tmp_path, "ddim", "--train", "--data", "one", *TINY)
    monkeypatch.setattr(ddim, "sample", None)  # it would fail otherwise
    told = run(tmp_path, "ddim", "--evaluate", "--data", "one", code=2).stderr
    assert "needs at least 2" in told
    told = run(tmp_path, "ddim", "--evaluate", "--data", "one", "--n", "3", code=2).stderr
    assert "6 is the least" in told
    both_acts = ["--train", "--evaluate", "--data", "one", "--run", "runs/new", *TINY]
    assert "needs at least 2" in run(tmp_path, "ddim", *both_acts, code=2).stderr
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.parametrize("script,evaluations", [
    ("ddpm", 50), ("ddim", 50), ("vdm", 50), ("shortcut_mcmc", 20), ("ddgan", 4)])
def test_each_script_says_what_its_closing_sheet_costs(script, evaluations, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs.Run, "closing", lambda self, n: asked.append(n) or 4)
    folder(tmp_path / "mine", {f"{i}.png": picture(i) for i in range(20)})
    pretrain = ["--pretrain", "0"] if script == "ddgan" else []
    done = run(tmp_path, script, "--train", "--data", "mine", *SMALL[script], *pretrain,
               "--iters", "2")
    assert asked == [evaluations]
    assert "4 samples in" in done.stdout and f"{evaluations} network evaluations" in done.stdout
    assert "\r" not in done.stderr  # into a file: lines
