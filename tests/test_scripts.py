"""The scripts as a user runs them: trained for seconds on drawn digits, sampled, resumed after SIGKILL, given wrong input."""
import contextlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import ddgan
from conftest import ROOT
from kernels.noise import randn

SMALL = ["--width", "8", "--multipliers", "1,2", "--blocks", "1", "--attention", "4", "--heads", "2", "--size", "8", "--batch", "16",
         "--lr", "2e-3"]
SMALL = {"ddpm": [*SMALL, "--T", "100"], "ddim": [*SMALL, "--T", "100"],
         "ddgan": [*SMALL, "--batch", "64", "--width-d", "8", "--z", "10", "--pretrain", "50", "--r1-every", "4"]}
POINTS = ["--data", "swirl", "--width", "32", "--T", "50", "--batch", "64"]
STEPS = {"ddpm": ["--steps", "7"], "ddim": ["--steps", "7"], "ddgan": []}  # ddgan.py takes its T and nothing else


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with one trained model of each script; the drawn data is made once."""
    folder = tmp_path_factory.mktemp("place")
    for script in SMALL:
        run(folder, script, "--train", "--iters", "200", *SMALL[script])
    return folder


def command(script, *flags):
    """fp32, which the curves and bounds here were measured with, also where `auto` would take bf16."""
    fp32 = ["--precision", "fp32"] if {"--train", "--sample", "--evaluate"} & {*flags} else []
    return [sys.executable, str(ROOT / f"{script}.py"), *fp32, *map(str, flags)]


def run(folder, script, *flags, code=0, **env):
    done = subprocess.run(command(script, *flags), cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == code, done.stderr[-2000:]
    return done


def losses(folder):
    rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    return np.stack([rows[name] for name in rows.dtype.names if name not in ("step", "seconds")], 1).squeeze()


@pytest.mark.parametrize("script", ["ddpm", "ddim"])
def test_a_run_learns_and_leaves_its_files(place, script):
    folder = place / "runs" / f"{script}-digits"
    assert {"checkpoint.pt", "config.json", "metrics.csv", "samples.png"} <= {p.name for p in folder.iterdir()}
    loss = losses(folder)
    assert len(loss) == 20 and loss[-5:].mean() < 0.6 * loss[0]
    # the curve as it was on 2026-11-22 (x86-64, torch 2.13.0); both scripts train the same network on the same draws
    np.testing.assert_allclose(loss[:4], [0.860038, 0.831784, 0.772153, 0.716601], rtol=2e-3)
    np.testing.assert_allclose(loss[-2:], [0.358923, 0.364306], rtol=3e-2)
    sheet = np.asarray(Image.open(folder / "samples.png"))
    assert sheet.ndim == 2 and len(np.unique(sheet)) > 20


def test_a_gan_run_learns_and_tells(place):
    """What G makes nears the data by least squares first; then both losses, R1 and D's accuracy stand in metrics.csv, for each t."""
    folder = place / "runs" / "ddgan-digits"
    assert {"checkpoint.pt", "config.json", "metrics.csv", "samples.png", "loss.png"} <= {p.name for p in folder.iterdir()}
    rows = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    names = [f"{name}_{t}" for name in ("loss_d", "loss_g", "error", "real", "fake") for t in range(1, 5)]
    assert {*names, "r1", "spread_1", "spread_4"} <= {*rows.dtype.names} and len(rows) == 20
    assert rows["error_1"][4] < 0.5 * rows["error_1"][0]  # at the end of --pretrain
    # the curves as they were on 2026-11-26 (x86-64, torch 2.13.0)
    np.testing.assert_allclose(rows["error_1"][:4], [0.724084, 0.652709, 0.511746, 0.377950], rtol=5e-3)
    np.testing.assert_allclose(rows["loss_d_1"][:4], [1.305287, 0.828070, 0.390827, 0.382047], rtol=3e-2)
    np.testing.assert_allclose(rows["loss_d_1"][-2:], [1.322768, 1.306770], rtol=3e-2)
    assert all(((0 <= rows[n]) & (rows[n] <= 1)).all() for n in names[12:]) and rows["r1"][-1] > 0
    assert abs(rows["loss_d_1"] + rows["loss_d_2"] - 4 * np.log(2)).max() > 0.03  # D is not asleep
    sheet = np.asarray(Image.open(folder / "samples.png"))
    assert sheet.ndim == 2 and len(np.unique(sheet)) > 20


def test_a_terminal_of_80_columns_shows_how_often_D_is_right(place):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command("ddgan", "--train", "--iters", 40, *SMALL["ddgan"], "--pretrain", 0, "--run", "bar"), cwd=place, stderr=theirs,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    assert process.wait(60) == 0
    lines = re.split(r"[\r\n]|\x1b\[A", text.decode())
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"real( \.\d\d| 1\.00){4}, fake( \.\d\d| 1\.00){4}, loss_d \d", line) for line in lines), text
    assert any("left, " in line and "images/s" in line for line in lines), text


@pytest.mark.parametrize("script", SMALL)
def test_sample_i_of_a_seed_is_the_same_whatever_n(place, script):
    pictures = {}
    for n in (3, 5):
        done = run(place, script, "--sample", "--n", n, *STEPS[script], "--seed", 4, "--out", f"{script}{n}.npz")
        assert f"{n} samples in" in done.stdout and f"{4 if script == 'ddgan' else 7} network evaluations" in done.stdout
        with np.load(place / f"{script}{n}.npz") as arrays:
            pictures[n] = arrays["arr_0"].astype(int)
            assert pictures[n].shape == (n, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8 and (arrays["arr_1"] == -1).all()
    near = np.abs(pictures[3] - pictures[5][:3]) <= 1
    assert near.mean() >= 0.999 and np.abs(pictures[5][0] - pictures[5][1]).mean() > 1
    run(place, script, "--sample", "--n", 3, *STEPS[script], "--seed", 4, "--out", "again.npz")
    with np.load(place / "again.npz") as arrays:
        assert (arrays["arr_0"] == pictures[3]).all()
    run(place, script, "--sample", "--n", 3, *STEPS[script], "--seed", 5, "--out", "other.npz")
    with np.load(place / "other.npz") as arrays:
        assert (arrays["arr_0"] != pictures[3]).any()


def test_out_takes_every_form(place):
    run(place, "ddim", "--sample", "--n", 4, "--steps", 3, "--out", "walk.gif")
    assert Image.open(place / "walk.gif").n_frames >= 3
    run(place, "ddim", "--sample", "--n", 2, "--steps", 3, "--out", "folder")
    assert sorted(p.name for p in (place / "folder").iterdir()) == ["00000.png", "00001.png"]
    assert Image.open(place / "folder" / "00000.png").size == (8, 8)


def test_ddim_takes_a_ddpm_checkpoint(place, tmp_path):
    run(place, "ddim", "--sample", "--n", 2, "--steps", 5, "--out", tmp_path / "a.npz", "--checkpoint", "runs/ddpm-digits/checkpoint.pt")
    os.symlink(place / "data", tmp_path / "data")
    os.makedirs(tmp_path / "runs")
    os.symlink(place / "runs" / "ddpm-digits", tmp_path / "runs" / "ddpm-digits")
    done = run(tmp_path, "ddim", "--sample", "--n", 2, "--steps", 5, "--out", "b.npz")
    assert "ddpm-digits" in done.stdout
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert (a["arr_0"] == b["arr_0"]).all()


def test_eta_1_is_ddpm(place):
    """The same checkpoint, noise and steps: DDIM's update with eta = 1 is DDPM's with the posterior variance."""
    run(place, "ddpm", "--train", "--iters", "60", *SMALL["ddpm"], "--variance", "beta-tilde", "--run", "tilde")
    for steps in (100, 10):
        run(place, "ddpm", "--sample", "--run", "tilde", "--n", 4, "--steps", steps, "--out", "p.npz")
        run(place, "ddim", "--sample", "--checkpoint", "tilde/checkpoint.pt", "--n", 4, "--steps", steps, "--eta", 1, "--out", "i.npz")
        with np.load(place / "p.npz") as p, np.load(place / "i.npz") as i:
            assert (np.abs(p["arr_0"].astype(int) - i["arr_0"].astype(int)) <= 1).mean() >= 0.999
            assert p["arr_0"].std() > 20


def test_encode_and_interpolate(place):
    done = run(place, "ddim", "--encode")
    table = {int(k): float(v) for k, v in (line.split() for line in done.stdout.splitlines()[1:-1])}
    assert sorted(table) == [10, 20, 50, 100] and table[100] < table[10]
    run(place, "ddim", "--interpolate", "--n", 2, "--steps", 4)
    assert Image.open(place / "runs" / "ddim-digits" / "interpolate.png").size[0] > 5 * Image.open(
        place / "runs" / "ddim-digits" / "interpolate.png").size[1] / 2


@pytest.mark.parametrize("script", ["ddpm", "ddim"])
def test_points_come_close_to_the_spiral(place, script):
    """Trained for seconds, the points are nearer to the data than the noise they start as; and --evaluate says so."""
    done = run(place, script, "--train", "--iters", "600", *POINTS)
    assert "1000 samples in" in done.stdout  # 64 points would show no shape
    run(place, script, "--sample", "--data", "swirl", "--n", 30, "--steps", 5, "--out", "points.npz")
    with np.load(place / "points.npz") as arrays:
        assert arrays["arr_0"].shape == (30, 2) and arrays["arr_0"].dtype == np.float32
    done = run(place, script, "--evaluate", "--data", "swirl")
    result = json.loads((place / "runs" / f"{script}-swirl" / "evaluation.json").read_text())
    assert "sliced Wasserstein" in done.stdout and result["samples"] == 1000 and result["network evaluations"] == 50
    assert result["wasserstein_floor"] < result["wasserstein"] < 0.15  # of pure noise: 0.4 (measured)


def test_ddgan_nears_the_spiral_and_takes_labels(place):
    for iters in (995, 1005):  # D's accuracy is looked at in update 1,000, before this process has written a row
        run(place, "ddgan", "--train", "--iters", iters, "--data", "swirl", "--width", "32", "--width-d", "32", "--batch", "64", "--lr", "1e-3")
    run(place, "ddgan", "--evaluate", "--data", "swirl")
    result = json.loads((place / "runs" / "ddgan-swirl" / "evaluation.json").read_text())
    assert result["network evaluations"] == 4 and result["wasserstein_floor"] < result["wasserstein"] < 0.3  # of pure noise: 0.4 (measured)
    run(place, "ddgan", "--train", "--iters", "100", *SMALL["ddgan"], "--conditional", "--run", "gan-labels")
    drawn = []
    for label, want in (([], [0, 1, 2]), (["--label", 7], [7, 7, 7])):
        run(place, "ddgan", "--sample", "--run", "gan-labels", "--n", 3, *label, "--out", "l.npz")
        with np.load(place / "l.npz") as arrays:
            assert arrays["arr_1"].tolist() == want
            drawn.append(arrays["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 20  # one seed, other labels


@pytest.mark.parametrize("flags", ["", "--T 1", "--T 1 --pretrain 2", "--T 8 --z 0 --batch 32", "--fake renoise", "--fake direct",
                                   "--fake direct --pretrain 10", "--gan-loss bce", "--r1 0", "--decay 10", "--T 3 --t-weights 1,2,1 --resample biggan",
                                   "--precision bf16"])
def test_every_ablation_of_ddgan_trains_and_samples(place, flags):
    """Twenty updates of the GAN: each flag changes what is logged, but for bce, which is the same function, and bf16, by little."""
    folder, flags = place / f"gan{flags.replace(' ', '-')}", flags.split()
    small = [*SMALL["ddgan"][:-4], *([] if "--pretrain" in flags else ["--pretrain", "0"])]  # of its flags r1's interval needs a penalty
    done = run(place, "ddgan", "--train", "--iters", "20", *small, *flags, "--run", folder)
    assert "64 samples" in done.stdout and np.isfinite(losses(folder)).all() and losses(folder)[-1].any()
    if flags and (plain := losses(place / "gan")).shape == losses(folder).shape:
        change, near = np.abs(losses(folder) - plain).max(), {"bce": 1e-3, "bf16": 0.2}.get(flags[-1])
        assert change < near if near else change > 0.01
        assert "bf16" not in flags or change > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SMALL))
def test_compiled_networks_learn_the_same(place, script):
    """torch.compile, on this device; D's penalty is a second derivative, which it cannot compile."""
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        flags = [*flags, "--pretrain", 0, "--r1-every", 2] if script == "ddgan" else flags
        run(place, script, "--train", "--iters", 20, *SMALL[script], *flags, "--run", f"{script}-{name}")
    assert_close(losses(place / f"{script}-compiled"), losses(place / f"{script}-eager"), rtol=2e-3, atol=2e-3)


def test_least_squares_stay_beside_the_gan(place):
    error = {}
    for recon in (0, 3):
        run(place, "ddgan", "--train", "--iters", "60", *SMALL["ddgan"], "--pretrain", "0", "--recon", f"{recon},0,0,0", "--run", f"recon{recon}")
        error[recon] = np.genfromtxt(place / f"recon{recon}" / "metrics.csv", delimiter=",", names=True)["error_1"]
    assert error[3][-1] < 0.8 * error[0][-1]


def test_least_squares_with_one_latent_ignore_it_and_with_four_do_not(place):
    spread = {}
    for last in (0, 200):
        run(place, "ddgan", "--train", "--iters", 200, *SMALL["ddgan"], "--pretrain", 200, "--pretrain-z", last, "--run", f"latents{last}")
        saved = weights(place / f"latents{last}")
        c = SimpleNamespace(**saved["config"] | dict(labels=0, device=torch.device("cpu"), precision="fp32"))
        net = ddgan.network(c, saved["data"]["shape"])
        net.load_state_dict(saved["net"])
        with torch.no_grad():
            x, t = randn((64, 1, 8, 8), 5), torch.full((64,), 2)
            spread[last] = torch.stack([ddgan.generate(c, net, x, t, randn((64, 10), k)) for k in range(8)]).var(0).mean()
    assert spread[0] < 1e-3 and spread[200] > 5e-3  # 9e-6 and 2e-2 (measured)


def test_the_discriminator_rests_until_300_updates_before_the_gan_begins(place):
    critics = []
    for iters in (1, 10, 20):
        run(place, "ddgan", "--train", "--iters", iters, *SMALL["ddgan"], "--pretrain", 310, "--run", "rests")
        critics.append(weights(place / "rests")["critic"])
    assert same(critics[0], critics[1]) and not same(critics[1], critics[2])
    rows = np.genfromtxt(place / "rests" / "metrics.csv", delimiter=",", names=True)
    assert ((rows["loss_d_2"] > 0) == (rows["step"] > 10)).all() and (rows["loss_g_2"] == 0).all() and (rows["error_2"] > 0).all()


@pytest.mark.parametrize("script", SMALL)
def test_evaluate_judges_pictures(place, script):
    done = run(place, script, "--evaluate", "--n", 100, *STEPS[script])
    result = json.loads((place / "runs" / f"{script}-digits" / "evaluation.json").read_text())
    assert "FCD" in done.stdout and 0 < result["fcd_floor"] < result["fcd"] and 0 <= result["recall"] <= 1
    assert (script != "ddpm") or 0.1 < result["bits/dim"] < 20


def test_the_number_to_judge_is_not_the_number_on_the_sheet(place):
    done = run(place, "ddim", "--train", "--iters", "10", *SMALL["ddim"], "--evaluate", "--n", 100, "--run", "sheet")
    assert "64 samples" in done.stdout and json.loads((place / "sheet" / "evaluation.json").read_text())["samples"] == 100


def test_labels_guidance_and_learned_variance(place):
    run(place, "ddpm", "--train", "--iters", "30", *SMALL["ddpm"], "--conditional", "--variance", "learned", "--predict", "eps", "--run", "labels")
    run(place, "ddpm", "--sample", "--run", "labels", "--n", 12, "--steps", 5, "--guidance", 2, "--out", "c.npz")
    run(place, "ddim", "--sample", "--checkpoint", "labels/checkpoint.pt", "--n", 3, "--steps", 5, "--label", 7, "--out", "d.npz")
    with np.load(place / "c.npz") as c, np.load(place / "d.npz") as d:
        assert c["arr_1"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1] and d["arr_1"].tolist() == [7, 7, 7]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script", SMALL)
def test_killed_and_resumed_equals_never_killed(place, script):
    """SIGKILL at a random moment of training, twice; then every weight, moment and logged loss is the same, bit for bit (on a CPU)."""
    flags = [script, "--train", "--iters", "400", *SMALL[script], "--device", "cpu"]
    whole = place / f"whole-{script}"
    run(place, *flags, "--run", whole)
    folder = place / f"killed-{script}"
    for _ in range(2):
        rows = len(losses(folder)) if (folder / "metrics.csv").exists() and (folder / "metrics.csv").read_text().count("\n") > 2 else 0
        often = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command(*flags, '--run', folder)[1:]}\n"
                 f"from common import runs; runs.SAVE_EVERY = 0.2; import {script}; {script}.main()")
        process = subprocess.Popen([sys.executable, "-c", often], cwd=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None and (
                not (folder / "metrics.csv").exists() or (folder / "metrics.csv").read_text().count("\n") < rows + 5):
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (folder / "checkpoint.pt").exists() and 0 < weights(folder)["step"] < 400
    run(place, *flags, "--run", folder)
    one, two = weights(whole), weights(folder)
    for part in ("net", "ema", "optimizer", "step", *(("critic", "optimizer_d") if script == "ddgan" else ())):
        assert same(one[part], two[part]), part
    assert losses(whole).tolist() == losses(folder).tolist()


def test_ctrl_c_saves_and_exits_130(place):
    process = subprocess.Popen(command("ddpm", "--train", "--iters", "100000", *SMALL["ddpm"], "--run", "stopped"), cwd=place,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (place / "stopped" / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and weights(place / "stopped")["step"] >= 10


def test_a_full_disk_ends_with_one_line(place):
    """No file may grow over 200 kB: the checkpoint cannot be written, and what is there stays."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(command("ddpm", "--train", "--iters", "20", *SMALL["ddpm"], "--run", "full"), cwd=place, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: resource.setrlimit(
                              resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "checkpoint.pt cannot be written" in done.stderr
    assert not [p for p in (place / "full").iterdir() if "checkpoint" in p.name]


@pytest.mark.parametrize("script", ["ddpm", "ddgan"])
def test_two_processes_equal_one(place, script):
    """Half the batch each: the loss curve of one process, to rounding. (One GPU would not do for two.)"""
    flags = ["--train", "--iters", "30", *SMALL[script], "--device", "cpu", "--conditional", *(["--pretrain", "10"] if script == "ddgan" else [])]
    one, two = place / f"one-{script}", place / f"two-{script}"
    run(place, script, *flags, "--run", one)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", str(ROOT / f"{script}.py"),
                    *flags, "--precision", "fp32", "--run", two], cwd=place, check=True, timeout=300, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(losses(one)) == 3 and (losses(one)[0] != losses(one)[2]).any()
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5 if script == "ddpm" else 1e-3)
    for part in ("net", "critic") if script == "ddgan" else ("net",):
        of_one, of_two = (weights(run)[part] for run in (one, two))
        for a, b in ((of_one[name], of_two[name]) for name in of_one if name != "r1"):  # r1, to be shown, is each process's own
            assert_close(a, b, atol=1e-4 if script == "ddpm" else 5e-4, rtol=1e-3)  # Adam magnifies small gradients


def test_help_imports_only_torch(tmp_path):
    for flags, code in ((["--help"], 0), ([], 0), (["--lr", "nan", "--train"], 2)):
        done = run(tmp_path, "ddim", *flags, code=code, PYTHONPROFILEIMPORTTIME="1")
        imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time")}
        assert "torch" in imported and not imported & {"PIL", "matplotlib", "torchvision"}
        assert "triton" not in imported or torch.cuda.is_available()
        assert not list(tmp_path.iterdir())


WRONG = [  # flags, and words that the one line on stderr must hold
    ("--sample --steps 0", "--steps"), ("--sample --steps 101", "from 1 to 100"), ("--sample --n 0", "--n"), ("--sample --n -3", "--n"),
    ("--sample --n many", "whole number"), ("--train --lr nan", "finite"), ("--train --lr 0", "more than 0"), ("--train --lr inf", "finite"),
    ("--train --iters -1", "--iters"), ("--train --width 0", "--width"), ("--train --batch 0", "--batch"), ("--train --T 1", "--T"),
    ("--train --data mnis", "no such file or folder"), ("--train --data empty", "empty"), ("--train --data texts", "texts"),
    ("--sample --checkpoint cut.pt", "damaged"), ("--sample --checkpoint no.pt", "no.pt"), ("--sample --checkpoint empty.pt", "damaged"),
    ("--sample --data mnist", "train first"), ("--sample --checkpoint other.pt --data mnist", "--data digits"),
    ("--sample --size 16", "--size 8"), ("--sample --out a.jpg", "unknown ending"), ("--sample --out texts/a.txt/b.png", "cannot be written"),
    ("--sample --device cuda", "--device cuda"), ("--sample --eat 1", "--eat"), ("--sample --lr 1e-3", "--train"), ("--train --n 3", "--sample"),
    ("--sample --label 3", "--conditional"), ("--sample --guidance 2", "--conditional"), ("--train --schedule cubic", "--schedule"),
    ("--train --multipliers 1,x", "whole numbers"), ("--train --heads 3 --fresh", "heads"), ("--train --width 16", "width = 8, not 16"),
    ("--train --checkpoint cut.pt", "--checkpoint"), ("--sample --precision fp8", "--precision"), ("--train --size 3", "--size"),
    ("--train --classes eleven", "eleven"), ("--train --data swirl --conditional", "--conditional"),
    ("--sample --n 300 --out many.gif", "256"), ("--train --width 9 --fresh", "odd"), ("--train --multipliers , --fresh", "no level"), ("--evaluate --inception no.pt", "no.pt"), ("--train --data swirl --heads 2", "--heads is for pictures"),
    ("--train --attention , --heads 2 --fresh", "--heads does nothing with --attention none"),
    ("--train --data gaussians --size 8", "--size is for pictures"), ("--sample --data swirl --out folder", ".npz"),
]


NOT_DDGAN = ("--steps", "--T 1", "--guidance", "--schedule")
WRONG = [(script, *wrong) for script in SMALL for wrong in WRONG if script != "ddgan" or not any(flag in wrong[0] for flag in NOT_DDGAN)]
WRONG += [("ddgan", *wrong) for wrong in (
    ("--sample --steps 3", "T = 4"), ("--train --T 9", "at most 8"), ("--train --batch 6 --fresh", "multiple of 4"), ("--train --batch 12 --fresh", "at least 64"),
    ("--train --t-weights 1,2 --fresh", "numbers for T = 4"), ("--train --t-weights 1,20,1,1 --fresh", "at least 92"),
    ("--train --pretrain-t-weights 1,2 --fresh", "--pretrain-t-weights has 2 numbers"),
    ("--train --recon 1 --fresh", "--recon has 1 numbers"), ("--train --recon 1,x --fresh", "'1,x' is not numbers"), ("--train --recon 0,0,-1,0 --fresh", "--recon"),
    ("--train --pretrain-z 9 --z 0 --fresh", "--pretrain-z does nothing with --z 0"), ("--train --T 1 --pretrain-z 9 --fresh", "--pretrain-z does nothing"), ("--train --fake copy", "--fake"),
    ("--train --iters 2000 --fresh", "before the GAN begins"), ("--train --pretrain 5 --pretrain-z 9 --fresh", "more than --pretrain 5"),
    ("--train --T 1 --fake renoise --fresh", "--fake does nothing"), ("--train --T 1 --t-weights 3 --fresh", "--t-weights does nothing"),
    ("--train --T 1 --pretrain 9 --pretrain-t-weights 3 --fresh", "--pretrain-t-weights does nothing"),
    ("--train --pretrain 0 --batch 32 --fresh", "equal shares of t, --t-weights ''"), ("--train --T 8 --batch 16 --fresh", "give at least 32\n"),
    ("--train --precision bf16 --data gaussians --fresh", "too coarse for points"),
    ("--train --r1 0 --r1-every 4 --fresh", "--r1-every does nothing with --r1 0"), ("--train --width-d 9 --fresh", "--width-d"),
    ("--train --width-d 1", "--width-d"), ("--sample --guidance 2", "--guidance"), ("--train --z 20", "z = 10, not 20"), ("--train --z -1", "--z"))]


@pytest.mark.parametrize("script,flags,words", WRONG, ids=[" ".join(w[:2]) for w in WRONG])
def test_wrong_input_ends_with_one_line(place, script, flags, words, monkeypatch, capsys):
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(place)
    if not (place / "cut.pt").exists():
        (place / "empty").mkdir()
        (place / "texts").mkdir()
        (place / "texts" / "a.txt").write_text("not a picture")
        (place / "empty.pt").write_bytes(b"")
        for name in ("ddpm", "ddim"):
            whole = (place / "runs" / f"{name}-digits" / "checkpoint.pt").read_bytes()
        (place / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (place / "other.pt").write_bytes((place / "runs" / f"{script}-digits" / "checkpoint.pt").read_bytes())
    before = (place / "runs" / f"{script}-digits" / "checkpoint.pt").read_bytes()
    if "--fresh" in flags:
        flags += " --run new"
    elif flags.startswith("--train") and "--data" not in flags:  # the flags of the run that is there, and the wrong one last
        flags = " ".join(["--train", *SMALL[script], *flags.split()[1:]])
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        __import__(script).main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count("\n") == 1 and err.startswith(f"{script}.py: error: "), err
    assert (place / "runs" / f"{script}-digits" / "checkpoint.pt").read_bytes() == before


def test_an_end_that_is_given_replaces_the_recipe_s(monkeypatch, tmp_path):
    """--iters alone is not cut short by the recipe's minutes, nor --minutes by its updates."""
    import ddpm
    from common import runs
    monkeypatch.chdir(tmp_path)
    for flags, iters, minutes in (("", 3000, 2.5), ("--iters 20000", 20000, 0), ("--minutes 9", ddpm.Config.iters, 9),
                                  ("--iters 5 --minutes 1", 5, 1)):
        monkeypatch.setattr(sys, "argv", ["ddpm.py", "--train", *flags.split()])
        c = runs.parse("ddpm", ddpm.Config, ddpm.RECIPES, "")
        assert (c.iters, c.minutes) == (iters, minutes)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("folder,T,size,lr,name", [("CelebA_HQ", 2, 256, 2e-4, "CelebA_HQ"), ("lsun", 4, 256, 1.6e-4, "lsun"),
                                                   ("photos", 4, 0, ddgan.Config.lr, "photos"), ("./cifar10", 4, 0, ddgan.Config.lr, "pictures-cifar10")])
def test_a_folder_takes_the_recipe_of_its_own_name(folder, T, size, lr, name, monkeypatch, tmp_path):
    from common import runs
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir()
    monkeypatch.setattr(sys, "argv", ["ddgan.py", "--train", "--data", folder])
    c = runs.parse("ddgan", ddgan.Config, ddgan.RECIPES, "")
    assert (c.T, c.size, c.lr, c.run.name) == (T, size, lr, f"ddgan-{name}")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_flag_of_another_script_is_an_error(place, capsys, monkeypatch):
    done = run(place, "ddpm", "--sample", "--eta", "0.5", code=2)
    assert "--eta" in done.stderr and done.stderr.count("\n") == 1
    done = run(place, "ddpm", "--sample", "--checkpoint", "runs/ddim-digits/checkpoint.pt", code=2)
    assert "checkpoint of ddim.py" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", SMALL)
def test_gpu_compiled_sampling_gives_the_same_pictures(place, script):
    """300 samples: two batches, each with a graph of its own; with the noise of each step (ddim: eta) drawn inside it."""
    for out, flags in (("plain.npz", []), ("compiled.npz", ["--compile"])):
        done = run(place, script, "--sample", "--n", 300, *STEPS[script], "--out", out, *flags, *(["--eta", 1] if script == "ddim" else []))
        assert "without a CUDA graph" not in done.stderr
    with np.load(place / "plain.npz") as a, np.load(place / "compiled.npz") as b:
        assert (np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int)) <= 2).mean() > 0.99 and a["arr_0"].std() > 20
