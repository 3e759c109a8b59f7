import contextlib
import csv
import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddgan
import ddim
import ddpm
from common import runs
from conftest import ROOT


# ------------------------------------------------------------------------------------------------------ random draws
def test_every_epoch_visits_each_picture_once():
    seen = torch.cat([runs.batch_index(50, 8, seed=3, step=s) for s in range(1, 26)])  # 200 = 4 epochs, batches across their ends
    for epoch in seen.view(4, 50):
        assert epoch.sort().values.tolist() == list(range(50))
    assert seen[:50].tolist() != seen[50:100].tolist()
    assert runs.batch_index(5, 12, seed=0, step=1).shape == (12,)  # a batch may hold more than an epoch


def test_draws_depend_on_their_three_numbers_alone():
    def draw(*key):
        return torch.rand(4, generator=runs.generator(*key)).tolist()
    torch.manual_seed(0)
    first = draw(0, runs.TIME, 7)
    torch.manual_seed(1)
    torch.rand(10)
    assert draw(0, runs.TIME, 7) == first
    assert len({tuple(draw(*k)) for k in ((0, 1, 7), (1, 0, 7), (0, 2, 7), (0, 1, 8), (2 ** 62, 1, 7), (7, 1, 0))}) == 6


def test_streams_are_distinct():
    names = "ORDER FLIP TIME NOISE DROP START STEP JUDGE".split()
    assert len({getattr(runs, n) for n in names}) == len(names)


def test_ranks_share_a_batch(monkeypatch):
    whole = list(range(12))
    parts = []
    for r in range(3):
        monkeypatch.setenv("RANK", str(r))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts += whole[runs.rows(12)]
    assert parts == whole


# --------------------------------------------------------------------------------------------------------------- EMA
def test_ema_against_its_definition():
    net = torch.nn.Linear(2, 1)
    ema = runs.EMA(net, 0.9)
    mean = net.weight.detach().clone().double()
    for n in range(1, 200):
        with torch.no_grad():
            net.weight.fill_(float(n))
        ema.update(net)
        decay = min(0.9, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * n
        assert_close(ema.net.weight.double(), mean, atol=1e-4, rtol=1e-6)  # from the first update: the warm-up is soon forgotten
    again = runs.EMA(torch.nn.Linear(2, 1), 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.updates == 199 and torch.equal(again.net.weight, ema.net.weight)


# ------------------------------------------------------------------------------------------------------------- files
def test_written_is_all_or_nothing(tmp_path):
    path = tmp_path / "a" / "file"
    with runs.written(path) as f:
        f.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with runs.written(path) as f:
            f.write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "torch pickle", "cut", "foreign", "number", "dot", "bytes",
                                     "shape"])
def test_bad_checkpoints_are_named_and_nothing_in_them_runs(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("hello " * 100)
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif content == "torch pickle":
        torch.save(dict(method="ddpm", config=Evil(), data={}, step=1), path)
    elif content == "foreign":
        torch.save({"state_dict": {"w": torch.ones(3)}}, path)
    elif content == "number":
        torch.save(3, path)
    elif content in ("dot", "bytes"):
        path.write_bytes(b"." if content == "dot" else b"\x80\x02J\x00")
    elif content == "shape":
        torch.save(dict(method="ddpm", config={}, data=3, step=1), path)
    else:
        torch.save(dict(method="ddpm", config={}, data={}, step=1, w=torch.ones(10000)), path)
        path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="not a checkpoint of this project, or is damaged"):
        runs.load_checkpoint(path, ("ddpm",))
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_sets_what_training_set_and_no_more(tmp_path, capsys):
    fields = dict(T=runs.option(7, "", low=2).metadata, multipliers=runs.option((1,), "", low=1).metadata, seed=runs.option(5, "").metadata)

    def read(config):
        torch.save(dict(method="ddpm", config=config, data=dict(data="digits", shape=[1, 4, 4], classes=["a"]), source="digits", step=1),
                   tmp_path / "c.pt")
        c = SimpleNamespace(checkpoint=str(tmp_path / "c.pt"), method="ddpm", given=set(), name="digits", size=0, classes=(), data="digits",
                            train_fields=fields, T=7, multipliers=(1,), seed=5, out="", sheet=0, run=tmp_path, lr=0.5, precision="fp32")
        return runs.trained(c)[1]
    c = read(dict(T=20, multipliers=[1, 2], out="/elsewhere.png", lr=9.0, seed=1))
    assert (c.T, c.multipliers, c.out, c.lr, c.seed) == (20, (1, 2), "", 0.5, 5) and (c.size, c.classes) == (4, ("a",))
    for config, words in ((dict(T="abc"), "damaged: T = 'abc'"), (dict(T=1), "damaged: T = 1"), (dict(multipliers=[1, -4]), "(1, -4)")):
        with pytest.raises(SystemExit) as stopped:
            read(config)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_pictures_without_a_class_train_as_unlabelled():
    c = SimpleNamespace(batch=1000, seed=0, labels=3)
    dropped = runs.drop_labels(torch.arange(1000) % 4 - 1, c, 5)
    assert (dropped[::4] == 3).all() and 0.05 < (dropped[1::4] == 3).float().mean() < 0.15 and dropped.min() == 0


# --------------------------------------------------------------------------------------------------------------- Run
class Thing:
    """Something to save."""
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return dict(value=self.value)

    def load_state_dict(self, state):
        self.value = state["value"]


def settings(folder, **more):
    c = dict(run=folder, method="ddpm", data="digits", name="digits", iters=35, minutes=0.0, lr=0.5, batch=4, seed=0, fresh=False,
             device=torch.device("cpu"), given=set(), train_fields=["lr", "iters", "minutes", "batch", "seed"])
    return SimpleNamespace(**{**c, **more})


class Data:
    """What a run notes of its data set."""
    shape, classes = (1, 4, 4), ["a", "b"]

    def __len__(self):
        return 50


DATA = Data()


def test_run_counts_saves_and_resumes(tmp_path):
    thing = Thing()
    for step in (run := runs.Run(settings(tmp_path / "r", iters=25), DATA, thing=thing)):
        thing.value += step
        run.log(loss=torch.tensor(float(step)))
    again = Thing()
    for step in (run := runs.Run(settings(tmp_path / "r"), DATA, thing=again)):
        assert step > 25
        again.value += step
        run.log(loss=torch.tensor(float(step)))
    assert again.value == sum(range(1, 36))
    with open(tmp_path / "r" / "metrics.csv") as f:
        rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(f)]
    assert rows == [(10, 5.5), (20, 15.5), (25, 23.0), (30, 28.0), (35, 33.0)]
    assert json.loads((tmp_path / "r" / "config.json").read_text())["seed"] == 0
    assert not list(runs.Run(settings(tmp_path / "r"), DATA, thing=Thing()))  # done: the same command does nothing


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    for step in (run := runs.Run(settings(tmp_path, iters=20), DATA, thing=Thing())):
        run.log(loss=torch.tensor(1.0))
    with open(tmp_path / "metrics.csv", "a") as f:
        f.write("30,1.00,7\n40,1.")  # as a killed run leaves them
    for step in (run := runs.Run(settings(tmp_path, iters=30), DATA, thing=Thing())):
        run.log(loss=torch.tensor(2.0))
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().split()] == ["step", "10", "20", "30"]


@pytest.mark.parametrize("change,words", [(dict(lr=0.1), "lr = 0.5, not 0.1"), (dict(seed=1), "seed = 0, not 1"),
                                          (dict(name="mnist"), "data = digits, not mnist"), (dict(method="ddim"), "checkpoint of ddpm.py")])
def test_a_changed_setting_is_named(change, words, tmp_path, capsys):
    for step in (run := runs.Run(settings(tmp_path, iters=10), DATA, thing=Thing())):
        run.log(loss=torch.tensor(1.0))
    with pytest.raises(SystemExit) as stopped:
        runs.Run(settings(tmp_path, **change), DATA, thing=Thing())
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    runs.Run(settings(tmp_path, iters=40, minutes=3.0), DATA, thing=Thing())
    assert list(runs.Run(settings(tmp_path, fresh=True, lr=0.1, iters=10), DATA, thing=Thing()))[0] == 1


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_EVERY", -1.0)
    thing = Thing()
    with pytest.raises(SystemExit) as stopped:
        for step in (run := runs.Run(settings(tmp_path), DATA, thing=thing)):
            thing.value = step
            run.log(loss=torch.tensor(math.nan if step >= 17 else 1.0))
    assert stopped.value.code == 2 and "update 17 is not finite" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoint.pt")["thing"]["value"] == 10


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    net = torch.nn.Linear(2, 1)
    with pytest.raises(SystemExit) as stopped:
        for step in (run := runs.Run(settings(tmp_path, iters=5), DATA, net=net)):
            run.log(loss=torch.tensor(1.0))
            net.weight.data[0, 0] = math.nan
    assert stopped.value.code == 2 and "a weight after update 5" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("script,flags,dtype", [
    ("ddpm", "", torch.bfloat16), ("ddpm", "--precision fp32", torch.float32), ("ddpm", "--predict mean", torch.float32),
    ("ddgan", "--data gaussians", torch.float32), ("ddim", "--data swirl --predict eps", torch.float32), ("ddgan", "", torch.bfloat16)])
def test_bf16_is_used_where_it_resolves_what_counts(script, flags, dtype, monkeypatch, capsys):
    script = __import__(script)
    monkeypatch.setattr(signal, "signal", lambda *which: None)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("sys.argv", ["script.py", "--train", "--device", "cpu", *flags.split()])
    c = runs.parse(script.__name__, script.Config, script.RECIPES, "")
    assert c.precision == {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]  # what config.json says
    with runs.autocast(c):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype
    if dtype == torch.float32 and "fp32" not in flags:
        monkeypatch.setattr("sys.argv", [*sys.argv, "--precision", "bf16"])
        with pytest.raises(SystemExit) as stopped:
            runs.parse(script.__name__, script.Config, script.RECIPES, "")
        assert stopped.value.code == 2 and "--precision bf16 is too coarse" in capsys.readouterr().err


def test_samples_are_drawn_in_order_and_refused_where_not_finite(capsys):
    c = SimpleNamespace(device=torch.device("cpu"), checkpoint="some/checkpoint.pt")
    x, watch = runs.draw(c, lambda first, n, y: torch.arange(first, first + n) + 1000.0 * y, 600, torch.arange(600) % 3)
    assert_close(x, torch.arange(600) + 1000.0 * (torch.arange(600) % 3))
    assert [n for n, _ in watch.laps] == [256, 256, 88]
    for bad in (math.nan, math.inf):
        with pytest.raises(SystemExit) as stopped:
            runs.draw(c, lambda first, n, y: torch.tensor([0.0] * (n - 1) + [bad]), 300)
        assert stopped.value.code == 2 and "some/checkpoint.pt draws samples that are not finite" in capsys.readouterr().err


def test_minutes_count_over_the_whole_run(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def train(minutes):
        done = 0
        for step in (run := runs.Run(settings(tmp_path, iters=1000, minutes=minutes), DATA, thing=Thing())):
            now[0] += 6.0
            done += 1
            run.log(loss=torch.tensor(1.0))
        return done
    assert train(1.0) == 10 and train(1.0) == 0 and train(1.5) == 5


# ----------------------------------------------------------------------------------------------- several processes
def test_averaged_gradients_are_those_of_the_whole_batch(tmp_path):
    """Two processes over gloo, with a double backward in the loss, as R1 has."""
    program = tmp_path / "p.py"
    program.write_text("""
import sys, torch
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from common import runs
torch.set_num_threads(1)
c = SimpleNamespace(batch=6, device=torch.device("cpu"))
runs.join(c)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
x = torch.randn(6, 3, dtype=torch.float64)[runs.rows(6)].requires_grad_()
y = net(x)
slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
(y.square().mean() + slope.square().sum(1).mean()).backward()
runs.average_gradients(net.parameters())
if runs.rank() == 0:
    torch.save([p.grad for p in net.parameters()], sys.argv[2])
runs.leave()
""")
    for n in (1, 2):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", program, ROOT,
                        tmp_path / f"{n}.pt"], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for one, two in zip(torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")):
        assert one is not None and one.abs().max() > 0 or one.numel() == 1
        assert_close(one, two, rtol=1e-12, atol=1e-14)


class FakeGraph:
    """A CUDA graph without CUDA: replay runs the step again on the very tensors it was captured with, into the same results."""

    def __init__(self):
        self.again = None

    def replay(self):
        for kept, new in zip(self.results, self.again()):
            kept.copy_(new)


def test_replayed_captures_once_for_each_shape_and_hands_over_every_tensor(monkeypatch):
    captured = []

    @contextlib.contextmanager
    def capture(graph):
        captured.append(graph)
        yield

    def step(c, net, x, t, label):
        def compute():
            return net.scale * x + t, x - t if label is None else x * label
        results = compute()
        if captured and captured[-1].again is None:
            captured[-1].again, captured[-1].results = compute, results
        return results

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(current_stream=lambda: stream, Stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
                            CUDAGraph=FakeGraph, graph=capture).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runs, "_graphs", {})
    c, plain = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(device=torch.device("cpu"))
    nets = SimpleNamespace(scale=2.0), SimpleNamespace(scale=-1.0)
    for net in nets:
        for size in (4, 3, 4):  # the second batch of four replays the first one's graph
            x = torch.arange(size).float()
            for label in (None, torch.arange(size).float()):
                for t in torch.tensor([[5.0], [2.0]]):
                    for got, want in zip(runs.replayed(c, step, net, x, t, label), runs.replayed(plain, step, net, x, t, label)):
                        assert_close(got, want)
    assert len(captured) == 8  # two networks, two sizes, with label and without


def test_replayed_without_capture_says_why_and_goes_on(monkeypatch, capsys):
    def refuse(graph):
        raise RuntimeError("operation not\npermitted when stream is capturing")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(current_stream=lambda: stream, Stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
                            set_stream=lambda s: None, CUDAGraph=FakeGraph, graph=refuse).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runs, "_graphs", {})
    c = SimpleNamespace(device=torch.device("cuda"))

    def triple(c, x):
        return 3 * x
    for value in (1.0, 2.0):
        assert runs.replayed(c, triple, torch.tensor(value)) == 3 * value
    assert capsys.readouterr().err == "sampling without a CUDA graph: operation not permitted when stream is capturing\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [ddpm, ddim, ddgan])
def test_gpu_a_replayed_step_gives_the_very_pictures_of_the_step(script, monkeypatch):
    monkeypatch.setattr(runs, "_graphs", {})
    torch.manual_seed(0)
    fields = dataclasses.asdict(script.Config()) | dict(width=32, attention=(8,), labels=0, seed=3, precision="fp32", eta=1.0)
    c = SimpleNamespace(**fields, device=torch.device("cuda:0"))
    net = script.network(c, (1, 16, 16)).cuda()
    torch.nn.init.normal_(net.last.weight, std=0.1)
    steps = () if script is ddgan else (7,)

    def pictures():
        return [script.sample(c, net, (1, 16, 16), first, size, *steps) for first, size in ((0, 8), (8, 8), (16, 5))]
    with monkeypatch.context() as patched:
        patched.setattr(runs, "replayed", lambda c, step, *args: step(c, *args))
        want = pictures()
    got = pictures()
    assert len(runs._graphs) == 2 and all(graph is not None for _, _, graph, _ in runs._graphs.values())
    for a, b in zip(got, want):
        assert_close(a, b, rtol=0, atol=0)


def test_the_first_batch_warms_up_and_is_told_as_such():
    watch = runs.Stopwatch(torch.device("cpu"))
    watch.laps = [(256, 10.0)]
    assert "256 samples in 10.0 s, 4 network evaluations each, 39.1 ms per sample: here" == watch.report(4, "here")
    watch.laps += [(256, 0.256), (100, 0.1)]
    assert "612 samples in 10.4 s, 4 network evaluations each, 1 ms per sample once warm: here" == watch.report(4, "here")
