"""The comparison of all methods: what it gives the scripts, what it keeps, what it says of it.

Scripts run in this process here, but for the interrupted one; the numbers they train by are small.
"""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from common import files, flags, metrics, runs, trilemma
from conftest import ROOT, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 120 small pictures in two classes."""
    place = tmp_path_factory.mktemp("trilemma")
    level = torch.randint(30, 220, (120,), generator=torch.Generator().manual_seed(0))
    for i, value in enumerate(level.tolist()):
        name = place / "mine" / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (8, 8), value)
        picture.paste(255 - value, (2, 2, 4 + i % 4, 6))
        picture.save(name)
    return place


def contest(folder, monkeypatch, *given):
    monkeypatch.chdir(folder)
    return trilemma.Contest(trilemma.parse(["--data", "mine", *given]))


@pytest.fixture
def programs(folder, monkeypatch):
    """The scripts, run here: the list of what they were asked for."""
    asked = []

    def start(script, *given, quiet=False):
        asked.append([script.stem, *map(str, given)])
        fewer = []
        if "--train" in given:
            fewer = ["--width", "8", "--multipliers", "1,2", "--batch", "16"]
            fewer += ["--width-d", "8", "--batch", "64"] if script.stem == "ddgan" else []
        return run(folder, script.stem, *given, *fewer).stdout

    monkeypatch.setattr(trilemma, "start", start)
    monkeypatch.setattr(trilemma, "TRIAL", 0.01)
    monkeypatch.setattr(runs, "LEAST", 0.2)  # seconds for a closing sheet
    monkeypatch.setattr(trilemma, "JUDGING", 100.0)  # however slow this machine is
    monkeypatch.setitem(metrics.UPDATES, 1, 40)
    monkeypatch.setattr(files, "program", "")
    monkeypatch.chdir(folder)
    return asked


def finish(*given):
    """The command to its end: its exit status."""
    with pytest.raises(SystemExit) as end:
        trilemma.main(["--data", "mine", *given])
    files.program = ""
    return end.value.code


def test_whole(folder, programs):
    """Two methods are trained and judged, the table and pictures are there; then nothing is left.

    What is taken away is made again, and no more.
    """
    given = ["--minutes", "0.02", "--methods", "ddgan,ddim", "--n", "12"]
    assert finish(*given) == 0
    place = folder / "runs" / "trilemma" / "mine-0.02"
    result = json.loads((place / "trilemma.json").read_text())
    found = [(row["method"], row["evaluations"]) for row in result["rows"]]
    assert found == [("ddim", 1), ("ddim", 4), ("ddim", 20), ("ddim", 50), ("ddgan", 4)]
    for row in result["rows"]:
        assert row["parameters"] > 1000 and row["images/s"] > 0 and row["ms"][0] > 0
        assert 0 <= row["recall"][0] <= 1 and row["fcd"][0] > 0 and row["fcd_floor"][0] > 0
    for name in ("trilemma.png", "strip.png"):
        with Image.open(place / name) as picture:
            assert len(set(picture.convert("L").tobytes())) > 10
    report = (place / "trilemma.md").read_text()
    assert "| ddgan | 4 |" in report and "[`ddim.py`](" in report

    trained = [words[0] for words in programs if "--train" in words]
    assert trained == ["ddim", "ddgan", "ddgan", "ddgan"]  # two of them for its pace
    network = programs[-2][programs[-2].index("--width"):]
    assert network[:4] == ["--width", "8", "--multipliers", "1,2"]  # that of the first one trained

    programs.clear()
    assert finish(*given) == 0 and not programs
    assert json.loads((place / "trilemma.json").read_text()) == result

    (place / "ddim" / "judged" / "4-0-12.json").unlink()
    assert finish(*given) == 0
    assert [words[:2] for words in programs] == [["ddim", "--sample"]]
    assert programs[0][programs[0].index("--steps") + 1] == "4"
    again = json.loads((place / "trilemma.json").read_text())["rows"]
    assert [row["fcd"] for row in again] == [row["fcd"] for row in result["rows"]]


def test_failure_is_told(folder, programs, monkeypatch, capsys):
    """A method whose script fails is left out, the others are judged, and the exit status tells."""
    start = trilemma.start

    def failing(script, *given, quiet=False):
        if script.stem == "vdm":
            raise trilemma.Failed("vdm.py: error: no luck")
        return start(script, *given, quiet=quiet)

    monkeypatch.setattr(trilemma, "start", failing)
    assert finish("--minutes", "0.01", "--methods", "vdm,ddim", "--n", "8") == 1
    assert "vdm is left out: vdm.py: error: no luck" in capsys.readouterr().err
    path = folder / "runs" / "trilemma" / "mine-0.01" / "trilemma.json"
    assert {row["method"] for row in json.loads(path.read_text())["rows"]} == {"ddim"}


@pytest.mark.slow
def test_more_of_the_same_run(folder, programs, monkeypatch):
    """What was interrupted is resumed with the flags that it had; of other data there is a word."""
    it = contest(folder, monkeypatch, "--minutes", "0.03", "--methods", "ddgan,ldm")
    start = trilemma.start
    monkeypatch.setattr(trilemma, "start", lambda *given, **more: start(*given, "--iters", "2")
                        if "trial" not in str(given) and "--train" in given
                        else start(*given, **more))
    for name in it.names:
        it.train(name)
        (it.run(name) / "trained.json").unlink()
    monkeypatch.setattr(trilemma, "start", start)
    (it.folder / "pace.json").unlink()
    first = {name: it.figures(name) for name in it.names}
    programs.clear()
    for name in it.names:
        it.train(name)
        assert it.figures(name)["updates"] > first[name]["updates"], name
    assert not any("trial" in word for words in programs for word in words)
    trilemma.keep(it.folder / "data.json", {"sum": 1})
    assert finish("--minutes", "0.03", "--methods", "ddgan") == 2


@pytest.mark.parametrize("minutes, pretrain, updates", [(1, 114, 285), (30, None, 8550)])
def test_shares(folder, monkeypatch, minutes, pretrain, updates):
    """Least squares take 40 % of the updates that fit, or their recipe's, and rates fall by then.

    An update takes 0.2 s here, and sheets a twentieth of the time.
    """
    monkeypatch.setitem(metrics.UPDATES, 1, 40)
    it = contest(folder, monkeypatch, "--minutes", str(minutes))
    trilemma.keep(it.folder / "pace.json", {"seconds": 0.2, "pretrain": 2600, "decay": 7000})
    least = [] if pretrain is None else ["--pretrain", pretrain]
    assert it.shares("ddgan") == [*least, "--decay", updates]
    assert it.shares("gan") == ["--decay", updates] and it.shares("vdm") == []


def test_time_to_judge(folder, monkeypatch, capsys):
    """What would take longer than training is left out; the pace comes first, then what is shown.

    An evaluation of a sample takes 40 ms here, and a start 3 s.
    """
    monkeypatch.setitem(metrics.UPDATES, 1, 40)
    it = contest(folder, monkeypatch, "--minutes", "15", "--n", "100", "--methods", "vdm")
    run_of = it.run("vdm")
    run_of.mkdir(parents=True)
    (run_of / "checkpoint.pt").write_bytes(b"of no matter here")
    clock, asked = [0.0], []
    monkeypatch.setattr(trilemma.time, "perf_counter", lambda: clock[0])

    def point(name, k, seed):
        asked.append((k, seed))
        clock[0] += 3 + 4 * k
        return {"ms": 40.0 * k, "evaluations": k}

    def bits(name):
        asked.append("bits")
        clock[0] += 100
        return {"bits/dim": 3.0}

    monkeypatch.setattr(it, "point", point)
    monkeypatch.setattr(it, "bits", bits)
    it.judge("vdm")
    assert asked[:8] == [(1, 0), (50, 0), (2, 0), (4, 0), (10, 0), (20, 0), "bits", (1, 1)]
    assert (250, 0) not in asked and (50, 1) in asked and 600 < clock[0] <= 900
    told = capsys.readouterr().out
    assert "vdm: 250 steps of seed 0: left out, since it would take 1003 s" in told
    first = list(asked)
    it.judge("vdm")
    assert asked == first and capsys.readouterr().out == told


@pytest.mark.parametrize("data, name", [(d, name) for d in ("digits", "stacked", "words", "mine",
                                                            "gaussians", "cifar10")
                                        for name in trilemma.METHODS])
def test_scripts_take_the_flags(folder, tmp_path, monkeypatch, data, name):
    """Each script's own parser takes the command, with the network of ddpm.py's recipe."""
    monkeypatch.chdir(tmp_path)
    it = object.__new__(trilemma.Contest)
    it.data, it.root, it.minutes, it.folder = data, "data", 5.0, tmp_path
    it.points, it.size = data == "gaussians", 8 if data == "mine" else None
    if data == "mine":
        (tmp_path / "mine").symlink_to(folder / "mine")
    method = trilemma.METHODS[name]
    if it.points and not method.points:
        return
    ddpm = __import__("ddpm")
    monkeypatch.setattr(sys, "argv", ["ddpm.py", "--train", "--data", data])
    c = flags.parse("ddpm", ddpm.FLAGS, ddpm.RECIPES, "")
    trilemma.keep(it.run("ddpm") / "config.json",
                  {field: getattr(c, field) for field in
                   ("width", "multipliers", "blocks", "attention", "heads", "resample")})
    trilemma.keep(tmp_path / "pace.json", {"seconds": 0.1, "pretrain": 2600, "decay": 7000})
    asked = []
    monkeypatch.setattr(trilemma, "start", lambda *given: asked.extend(map(str, given)))
    monkeypatch.setattr(trilemma, "identity", lambda path: "")
    it.train(name)
    module = __import__(method.script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", asked)
    given = flags.parse(module.__name__, module.FLAGS, module.RECIPES, "")
    module.check(given) if hasattr(module, "check") else None
    assert given.minutes == 5 and given.width == c.width and given.iters == 1_000_000
    assert not getattr(given, "captions", False)  # which would need maps that attend
    assert given.run == it.run(name) and (it.points or given.multipliers == c.multipliers)
    files.program = ""


def row(method, evaluations, *fcd):
    return dict(method=method, evaluations=evaluations, fcd=list(fcd))


def test_ties():
    """Ranges that meet are a tie, others are not, and one seed calls none."""
    rows = [row("a", 4, 1.0, 1.2, 1.4), row("b", 4, 1.3, 1.5, 1.7), row("c", 4, 1.5, 1.6, 1.7),
            row("a", 20, 0.5, 0.6, 0.7), row("c", 20, 0.71, 0.8, 0.9), row("b", 50, 1, 1, 1),
            row("a", 250, 0.4), row("b", 250, 0.39)]
    assert trilemma.ties(rows) == ["4: a, a tie with b", "20: a", "250: b has the smallest, by one "
                                   "seed, which calls no tie"]


def test_short_numbers():
    assert [trilemma.number(x) for x in (0.0123, 0.1234, 0.999, 1.234, 12.34, 12345)] == \
        ["0.012", "0.12", "1.00", "1.23", "12.3", "12,345"]
    assert trilemma.spread([1.0, 2.0, 1.5]) == "1.5 (1–2)" and trilemma.spread([0.5]) == "0.50"


@pytest.mark.parametrize("given, words", [
    (["--methods", "ddim,dalle"], "--methods"),
    (["--methods", ""], "--methods"),
    (["--minutes", "0"], "--minutes"),
    (["--minutes", "nan"], "--minutes"),
    (["--minutes", "long"], "--minutes"),
    (["--no-such"], "--no-such"),
    (["--n", "3"], "--n"),
    (["--data", "nowhere"], "nowhere"),
])
def test_wrong_flags(tmp_path, monkeypatch, capsys, given, words):
    """Exit status 2, one line, and no folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        trilemma.main(given)
    files.program = ""
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and words in said and "\n" not in said
    assert not (tmp_path / "runs").exists()


def test_points_have_no_latents(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    it = trilemma.Contest(trilemma.parse(["--data", "gaussians", "--minutes", "1"]))
    assert "ldm" not in it.names and "vdm" in it.names
    assert it.network() == []
    run_of = it.run("ddpm")
    trilemma.keep(run_of / "config.json", {"width": 128, "attention": [16]})
    assert it.network() == ["--width", "128"]


def test_too_few_pictures(folder, programs, capsys):
    """Said before anything is trained."""
    place = folder / "few"
    place.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(place / f"{i}.png")
    with pytest.raises(SystemExit) as end:
        trilemma.main(["--data", "few"])
    assert end.value.code == 2 and "too few pictures" in capsys.readouterr().err and not programs


def test_interrupted(tmp_path):
    """Ctrl-C reaches the script that trains, which saves; the same command would go on."""
    program = subprocess.Popen(
        [sys.executable, "-m", "common.trilemma", "--data", "gaussians", "--minutes", "5",
         "--methods", "ddim"], cwd=tmp_path,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    place = tmp_path / "runs" / "trilemma" / "gaussians-5" / "ddim"
    end = time.monotonic() + 120
    try:
        while not (place / "metrics.csv").exists() and time.monotonic() < end:
            assert program.poll() is None, program.stderr.read()
            time.sleep(0.1)
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 130 and "the same command goes on from here" in err
    assert (place / "checkpoint.pt").exists() and not (place / "trained.json").exists()
    assert "Traceback" not in err
