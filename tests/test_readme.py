"""README is true: its commands run, its files are there, what it says of changing a line is so.

Each command runs here in a short form, in the order of the page, or stands in BY_HAND with why not
and when it was last run by hand.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from common import metrics, runs, trilemma
from conftest import ROOT, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = (ROOT / "assets" / "README.md").read_text(encoding="utf-8")
INSTALL = ("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
           ".venv/bin/python ")
BY_HAND = {  # command: why it does not run here, and when it was run by hand
    INSTALL + "ddim.py --train": "it installs; 2026-11-27",
    INSTALL + "-m pytest": "these are the tests; .ci/run calls it",
    "python -m pytest tests/test_ddim.py tests/test_schedules.py": "these are the tests",
    "python ddim.py --encode": "to 1,000 steps; tests/test_scripts.py; 2026-11-27",
    "python vdm.py --evaluate": "bits of 500 pictures; tests/test_scripts.py; 2026-11-27",
    "python -m common.trilemma": "two and a half hours; 2026-11-27",
    "python -m common.trilemma --minutes 1": "20 minutes; tests/test_trilemma.py; 2026-11-27",
    "torchrun --nproc-per-node 2 -- ddpm.py --train --run runs/two":
        "tests/test_scripts.py; 2026-11-27",
    "python -m kernels.bench": "tests/test_bench.py; 2026-11-27",
}
SMALL = ["--iters", "3", "--width", "8", "--batch", "16"]  # of every training
OF_SCRIPT = {"ddgan": ["--batch", "64", "--width-d", "8"], "ldm": ["--width-ae", "8"],
             "shortcut_mcmc": ["--part", "8"]}


def commands():
    """Every command of the page, in its order: lines of code and what stands between backticks."""
    blocks = re.findall(r"^    (\S.*)$|`([^`]*)`", README, re.M)
    texts = [" ".join(re.sub(r"  +#.*", "", line or inline).split()) for line, inline in blocks]
    found = [text for text in texts
             if re.match(r"(python3?|torchrun) \S", text) and "import" not in text]
    return list(dict.fromkeys(found))


def test_by_hand_is_no_longer_than_it_must_be():
    assert len(commands()) > 20
    assert set(BY_HAND) <= set(commands())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures under the names that the page uses."""
    folder = tmp_path_factory.mktemp("readme")
    colours = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    (folder / "mine").mkdir()
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for i, colour in enumerate(colours):
            Image.fromarray(colour).save(folder / "mine" / f"{i}.png")
            (folder / "mine" / f"{i}.txt").write_text("a red car" if i % 2 else "a blue house")
            archive.write(folder / "mine" / f"{i}.png", f"photos/{i}.png")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(metrics.UPDATES, 1, 20)
    monkeypatch.setattr(runs, "LEAST", 0.2)  # seconds for a closing sheet
    yield folder
    monkeypatch.undo()


def test_commands(place):
    """All others, one after the other in one folder, as a reader would go through the page."""
    run(place, "ddim", "--train", *SMALL)  # of the first line, which installs
    for text in commands():
        if text in BY_HAND:
            continue
        program, script, *given = shlex.split(text)
        assert program == "python" and script.endswith(".py"), text
        name = script.removesuffix(".py")
        if "--train" in given:
            few = SMALL + OF_SCRIPT.get(name, [])
            if text == "python ddgan.py --train":
                few = [*few, "--pretrain", "1"]
            if "--minutes" in given:
                few = [*few, "--iters", "4"]
            if "--init" in given:
                few = few[:2] + few[4:]  # the width is the file's
            run(place, name, *given, *few)
        elif "--evaluate" in given:
            run(place, name, *given, "--n", "6", "--steps", "2")
        else:
            few = ["--walk", "3"] if "--walk" in given else []
            few += [] if {"--n", "--encode", "--interpolate"} & {*given} else ["--n", "4"]
            run(place, name, *given, *few)
    for made in ("walk.gif", "latents.npz", "two/00001.png", "runs/labels"):
        assert (place / made).exists(), made


def test_python(place, monkeypatch):
    """The lines for Python, as they stand there."""
    if not (place / "runs" / "ddim-digits").exists():
        run(place, "ddim", "--train", *SMALL)
    lines = re.search(r"^    import ddim.*\n(?:    .*\n)+", README, re.M)[0]
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    with contextlib.chdir(place):
        exec("\n".join(line[4:] for line in lines.splitlines()), names)
    assert names["x"].shape == (16, 1, 16, 16) and not names["x"].equal(names["y"])


def test_changed_lines(tmp_path):
    """What the page says of a loss, a flag, a schedule and the notebook of a sampler, in a copy."""
    for part in ("common", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    script, schedules = (ROOT / "ddim.py").read_text(), (ROOT / "common/schedules.py").read_text()
    page = " ".join(README.split())
    flag = re.search(r"`(power: float = option\(.*?\))`", page)[1]
    loss = re.search(r"read as `c.power`: `(return .*?)`", page)[1]
    assert "`return F.l1_loss(out.float(), target)`" in page
    old = "    return F.mse_loss(out.float(), target)\n"
    assert script.count(old) == 1
    script = script.replace(old, f"    {loss}\n")
    script = script.replace("class Config:\n", f"class Config:\n    {flag}\n", 1)
    start, loop = re.search(r"# before the loop\n(.*?\n)    # in the loop.*?\n(.*?\n)\n", NOTEBOOK,
                            re.S).groups()
    head, body, tail = re.search(
        r"(.*?\ndef sample\(.*?\n)(    for i in .*?\n        x, x0_ = .*?\n)(.*)", script,
        re.S).groups()
    loop = re.sub("^    ", " " * 8, loop, flags=re.M)
    script = f"{head}{start}{body}{loop}{tail}"
    (tmp_path / "ddim.py").write_text(script)
    name, branch = re.search(r"`elif schedule == \"(\w+)\": (beta = .*?)`", page).groups()
    schedules = re.sub(r"SCHEDULES = \(", f'SCHEDULES = ("{name}", ', schedules, count=1)
    head, tail = schedules.split("    else:", 1)
    schedules = f'{head}    elif schedule == "{name}":\n        {branch}\n    else:{tail}'
    (tmp_path / "common" / "schedules.py").write_text(schedules)
    done = subprocess.run(
        [sys.executable, "ddim.py", "--train", "--iters", "10", "--width", "8", "--batch", "16",
         "--sample", "--steps", "5", "--n", "4", "--power", "1.5", "--schedule", name,
         "--data-root", tmp_path / "data"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-1000:]
    settings = json.loads((tmp_path / "runs" / "ddim-digits" / "config.json").read_text())
    assert settings["power"] == 1.5 and settings["schedule"] == name
    assert (tmp_path / "runs" / "ddim-digits" / "metrics.csv").read_text().count("\n") == 2


def test_figures():
    """The table is the one of assets/trilemma.json, to the letter."""
    result = json.loads((ROOT / "assets" / "trilemma.json").read_text())
    assert trilemma.short(result) in README
    assert trilemma.report(result, "../") == (ROOT / "assets" / "trilemma.md").read_text()


def headings(text):
    """The anchors of a page."""
    found = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", ["README.md", "assets/README.md", "kernels/bench.md"])
def test_links(page):
    """Pictures and files are there, headings too, and pictures are small."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            assert heading in headings(file.read_text(encoding="utf-8")), target
        if file.suffix == ".png":
            assert file.stat().st_size < 200_000, target
