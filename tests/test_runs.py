"""common/runs.py: weights, checkpoints, the run in its folder; and several processes."""
import copy
import csv
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.testing import assert_close

import ddim
import ddpm
from common import files, flags, pictures, runs
from conftest import ROOT
from conftest import settings as script_settings


# ------------------------------------------------------------------------------------------ weights
def test_ema_against_its_definition():
    net = torch.nn.Linear(2, 1)
    net.register_buffer("scale", torch.zeros(()))
    ema = runs.EMA(net, 0.9)
    mean = net.weight.detach().clone().double()
    for n in range(1, 200):
        with torch.no_grad():
            net.weight.fill_(float(n))
            net.scale.fill_(n / 2)
        ema.update(net)
        decay = min(0.9, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * n
        # from the first update: the warm-up is soon forgotten
        assert_close(ema.net.weight.double(), mean, atol=1e-4, rtol=1e-6)
        assert ema.net.scale == n / 2  # a buffer is no mean
    again = runs.EMA(torch.nn.Linear(2, 1), 0.9)
    again.net.register_buffer("scale", torch.zeros(()))
    again.load_state_dict(ema.state_dict())
    assert again.updates == 199 and torch.equal(again.net.weight, ema.net.weight)


def test_rates_are_each_group_s_own_share():
    body, head = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    head.bias.requires_grad_(False)
    groups = [dict(params=runs.learnable(body)), dict(params=runs.learnable(head), scale=0.1)]
    optimizer = torch.optim.Adam(groups, 1.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    for rate in (0.5, 0.25):
        runs.set_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.1 * rate]
    again = torch.optim.Adam(groups, 1.0)
    again.load_state_dict(optimizer.state_dict())
    runs.set_rate(again, 1.0)
    assert [group["lr"] for group in again.param_groups] == [1.0, 0.1]


# -------------------------------------------------------------------------------------- checkpoints
class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "torch pickle", "cut", "foreign",
                                     "number", "dot", "bytes", "shape"])
def test_bad_checkpoints_are_named_and_nothing_in_them_runs(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    written = {"empty": b"", "text": b"hello " * 100, "pickle": pickle.dumps(Evil()), "dot": b".",
               "bytes": b"\x80\x02J\x00"}
    saved = {"torch pickle": dict(method="ddpm", config=Evil(), data={}, step=1),
             "foreign": {"state_dict": {"w": torch.ones(3)}}, "number": 3,
             "shape": dict(method="ddpm", config={}, data=3, step=1),
             "cut": dict(method="ddpm", config={}, data={}, step=1, w=torch.ones(10000))}
    if content in written:
        path.write_bytes(written[content])
    else:
        torch.save(saved[content], path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="not a checkpoint of this project, or is damaged"):
        runs.load_checkpoint(path, ("ddpm",))
    assert not (tmp_path / "executed").exists()


def checkpoint(path, config, **more):
    """A file as Run.save leaves it, without weights."""
    data = dict(data="digits", shape=[1, 4, 4], classes=["a", "b"])
    torch.save(dict(method="ddpm", config=config, data=data, source="digits", step=1,
                    seconds=1.0) | more, path)
    return str(path)


def adam(channels_last=False):
    """A network with moments in an Adam."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.9), fused=True)
    learn(net, optimizer)
    return net, optimizer


def learn(net, optimizer):
    optimizer.zero_grad()
    x = torch.linspace(-1, 2, 54).square().view(2, 3, 3, 3)  # no two places alike
    net(x).square().sum().backward()
    optimizer.step()


def test_moments_come_back_in_the_order_of_the_parameters():
    """Whatever their strides in the file; rates and betas are the script's."""
    net, optimizer = adam(channels_last=True)
    saved = dict(net=copy.deepcopy(net.state_dict()),
                 optimizer=copy.deepcopy(optimizer.state_dict()))
    for moments in saved["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].clone(memory_format=torch.contiguous_format)
    saved["optimizer"]["param_groups"][0] |= dict(betas=(0.1, 0.1), lr=9.0, amsgrad=True)
    again, optimizer_2 = adam(channels_last=True)
    learn(again, optimizer_2)
    runs.load_states(saved, "a.pt", net=again, optimizer=optimizer_2)
    assert optimizer_2.param_groups[0]["betas"] == (0.5, 0.9)
    learn(net, optimizer)
    learn(again, optimizer_2)
    for one, two in zip(net.parameters(), again.parameters()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("how", ["short", "long", "a number", "float64", "missing", "more",
                                 "no Tensor", "step", "key", "groups", "weight", "buffer", "count"])
def test_states_that_do_not_fit_are_told_before_any_is_loaded(how):
    """Adam compares no shapes: a short moment would be written beyond its end."""
    net, optimizer = adam()
    ema = runs.EMA(net, 0.9)
    saved = copy.deepcopy(dict(net=net.state_dict(), ema=ema.state_dict(),
                               optimizer=optimizer.state_dict()))
    state = saved["optimizer"]["state"]
    first = state[0]["exp_avg"]
    odd = {"short": first[:2], "long": torch.cat([first, first]), "a number": torch.tensor(0.0),
           "float64": first.double(), "no Tensor": 3.0}
    if how in odd:
        state[0]["exp_avg"] = odd[how]
    elif how == "missing":
        del state[0]["exp_avg_sq"]
    elif how == "more":
        state[0]["max_exp_avg_sq"] = first
    elif how == "step":
        state[0]["step"] = torch.tensor(-1.0)
    elif how == "key":
        state[-1] = state.pop(0)
    elif how == "groups":
        saved["optimizer"]["param_groups"][0]["params"] = [0, 1]
    elif how == "weight":
        saved["net"]["0.bias"] = torch.zeros(5)
    elif how == "buffer":
        saved["net"]["0.bias"] = torch.zeros(4, dtype=torch.int64)
    else:
        saved["ema"]["updates"] = -10
    saved["net"]["2.bias"] = torch.full((2,), 7.0)
    kept = copy.deepcopy([*net.state_dict().values(), optimizer.state_dict()])
    with pytest.raises(ValueError, match="^a.pt is damaged, or does not fit this version"):
        runs.load_states(saved, "a.pt", net=net, ema=ema, optimizer=optimizer)
    assert_close([*net.state_dict().values(), optimizer.state_dict()], kept, atol=0, rtol=0)


def test_a_checkpoint_sets_what_training_set_and_no_more(tmp_path):
    def read(config):
        path = checkpoint(tmp_path / "c.pt", config)
        c = script_settings(ddpm, T=7, seed=5, guidance=0.5)
        c.checkpoint = path
        return runs.trained(c)[0]

    c = read(dict(T=20, multipliers=[1, 2], out="/elsewhere.png", guidance=9.0, seed=1,
                  conditional=True))
    assert (c.T, c.multipliers, c.out, c.guidance, c.seed) == (20, (1, 2), "", 0.5, 5)
    assert (c.size, c.classes, c.shape, c.labels) == (4, ("a", "b"), (1, 4, 4), 2)
    for config, words in ((dict(T="abc"), "damaged: T = 'abc'"), (dict(T=1), "damaged: T = 1"),
                          (dict(multipliers=[1, -4]), r"\(1, -4\)")):
        with pytest.raises(ValueError, match=words):
            read(config | dict(conditional=True))


def test_what_a_checkpoint_does_not_know_has_the_default_and_is_told(tmp_path, capsys):
    """The default of row "", not the recipe's of today: it was trained before there was one."""
    path = checkpoint(tmp_path / "c.pt", dict(conditional=True), net={})
    c, _ = runs.trained(script_settings(ddpm, checkpoint=path, guidance=2))
    said = capsys.readouterr().err
    assert said.startswith(f"{path} is older than some flags, and goes by --T 1000, ")
    assert c.width == ddpm.RECIPES[""]["width"] != ddpm.RECIPES["digits"]["width"]
    assert c.predict == ddpm.Config.predict


def test_another_script_s_setting_comes_along_where_it_is_asked_for(tmp_path):
    path = checkpoint(tmp_path / "c.pt", dict(variance="learned", predict="mean"))
    c = script_settings(ddim, checkpoint=path)
    with pytest.raises(ValueError, match="is a checkpoint of ddpm.py, which ddim.py cannot use"):
        runs.trained(c)
    c, _ = runs.trained(c, ("ddim", "ddpm"), also=("variance",))
    assert (c.variance, c.predict) == ("learned", "mean")
    c, _ = runs.trained(script_settings(ddim, checkpoint=path), ("ddim", "ddpm"))
    assert not hasattr(c, "variance")
    checkpoint(path, dict(variance=3))
    with pytest.raises(ValueError, match="damaged: variance = 3"):
        runs.trained(c, ("ddim", "ddpm"), also=("variance",))


# ---------------------------------------------------------------------------------------------- Run
class Thing:
    """Something to save."""
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return dict(value=self.value)

    def load_state_dict(self, state):
        self.value = state["value"]


def settings(folder, **more):
    more = dict(run=folder, iters=35, minutes=0.0, lr=0.5, batch=4) | more
    return script_settings(ddpm, **more)


class Data:
    """What a run notes of its data set."""
    shape, classes = (1, 4, 4), ["a", "b"]

    def __len__(self):
        return 50

    def content(self):
        return None  # as points: nothing tells one set of them from another

    capped = False

    def told(self):
        return "50 pictures to train with"


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
    # done: the same command does nothing
    assert not list(runs.Run(settings(tmp_path / "r"), DATA, thing=Thing()))


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    for step in (run := runs.Run(settings(tmp_path, iters=20), DATA, thing=Thing())):
        run.log(loss=torch.tensor(1.0))
    with open(tmp_path / "metrics.csv", "a") as f:
        f.write("30,1.00,7\n40,1.")  # as a killed run leaves them
    for step in (run := runs.Run(settings(tmp_path, iters=30), DATA, thing=Thing())):
        run.log(loss=torch.tensor(2.0))
    steps = [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().split()]
    assert steps == ["step", "10", "20", "30"]


def test_columns_may_come_go_and_change_places_between_two_runs(tmp_path):
    """Who adds a number to run.log keeps the old rows, each value under its own name."""
    def train(iters, **values):
        for step in (run := runs.Run(settings(tmp_path, iters=iters), DATA, thing=Thing())):
            run.log(**values)

    train(10, loss=1.0, error=torch.tensor([2.0, 3.0]))
    train(20, snr=4.0, error=torch.tensor([5.0, 6.0, 7.0]), loss=8.0)
    train(30, error=torch.tensor([9.0]))
    with open(tmp_path / "metrics.csv") as f:
        rows = list(csv.DictReader(f))
    columns = "loss error_1 error_2 snr error_3".split()
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    assert [[row[name] for name in columns] for row in rows] == [
        ["1", "2", "3", "", ""], ["8", "5", "6", "4", "7"], ["", "9", "", "", ""]]
    assert all(None not in row and len(row) == 7 for row in rows)
    pictures.curves(tmp_path)  # holes are left out
    assert (tmp_path / "loss.png").exists()


def test_a_table_that_is_lost_while_it_trains_begins_anew(tmp_path):
    for step in (run := runs.Run(settings(tmp_path), DATA, thing=Thing())):
        run.log(loss=float(step))
        if step == 20:
            (tmp_path / "metrics.csv").unlink(missing_ok=True)
    with open(tmp_path / "metrics.csv") as f:
        assert [row["step"] for row in csv.DictReader(f)][-2:] == ["30", "35"]
    pictures.curves(tmp_path)


def test_an_error_within_the_loop_unlocks_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = settings(tmp_path / "r", data="swirl", labels=0)
    data = runs.begin(c)
    assert files._locks
    with pytest.raises(ZeroDivisionError):
        for step in runs.Run(c, data, thing=Thing()):
            1 / 0
    assert not files._locks


def test_a_closed_terminal_saves_and_nohup_does_not(tmp_path):
    """SIGHUP: 130 with a checkpoint; where it is ignored, training goes on."""
    def train():
        for step in (run := runs.Run(settings(tmp_path, iters=20), DATA, thing=Thing())):
            run.log(loss=1.0)
            if step == 7:
                os.kill(os.getpid(), signal.SIGHUP)
        return run.step

    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as stopped:
        train()
    assert stopped.value.code == 130 and torch.load(tmp_path / "checkpoint.pt")["step"] == 7
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        (tmp_path / "checkpoint.pt").unlink()
        assert train() == 20
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_next_start_removes_what_a_killed_one_was_writing(tmp_path):
    for name in (".999-checkpoint.pt", ".99-metrics.csv", ".9-samples.png", ".99-other.pt"):
        (tmp_path / name).write_text("half")
    runs.Run(settings(tmp_path), DATA, thing=Thing())
    # samples may be drawn beside training
    assert {p.name for p in tmp_path.glob(".*")} == {".9-samples.png", ".99-other.pt"}


SPREADSHEETS = {
    "as it is": lambda text: text,
    "semicolons": lambda text: "\ufeff" + text.replace(",", ";").replace(".", ","),
    "tabs": lambda text: text.replace(",", "\t"),
    "blank lines": lambda text: text.replace("\r\n", "\n\n") + ",,\n\n",
    "quotes": lambda text: text.replace("loss", '"loss"').replace("10,", '"10",'),
    "half a line": lambda text: text + "4",
}


@pytest.mark.parametrize("how", SPREADSHEETS)
def test_a_table_that_a_spreadsheet_wrote_is_gone_on_with(how, tmp_path):
    for step in (run := runs.Run(settings(tmp_path, iters=25), DATA, thing=Thing())):
        run.log(loss=step / 2)
    table = tmp_path / "metrics.csv"
    before = table.read_bytes()
    table.write_bytes(SPREADSHEETS[how](before.decode()).encode())
    pictures.curves(tmp_path)
    for step in (run := runs.Run(settings(tmp_path, iters=30), DATA, thing=Thing())):
        run.log(loss=step / 2)
    assert table.read_bytes().startswith(before)
    with open(table, newline="") as f:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(f)] == [
            ("10", "2.75"), ("20", "7.75"), ("25", "11.5"), ("30", "14")]


@pytest.mark.parametrize("text", ["step,seconds,loss\n10,1.0,many\n", "hello\n\n3\n", "\0\n1\n",
                                  "\xff\n", "step,seconds,loss\ninf,1.0,1.0\n"])
def test_what_is_no_table_is_kept_aside(text, tmp_path, capsys):
    for step in (run := runs.Run(settings(tmp_path, iters=10), DATA, thing=Thing())):
        run.log(loss=1.0)
    (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    for step in (run := runs.Run(settings(tmp_path, iters=20), DATA, thing=Thing())):
        run.log(loss=2.0)
    said = capsys.readouterr().err
    assert re.search(r"metrics.csv cannot be read as a table \(.*\): it is kept as .*-10.csv", said)
    assert (tmp_path / "metrics-before-10.csv").read_bytes() == text.encode("latin-1")
    assert [row["step"] for row in pictures.table_of(tmp_path / "metrics.csv")[1]] == ["20"]


def test_names_that_change_within_a_run_are_told(tmp_path):
    with pytest.raises(ValueError, match="has snr in update 3, and before loss: log the same"):
        for step in (run := runs.Run(settings(tmp_path), DATA, thing=Thing())):
            run.log(**{"snr" if step == 3 else "loss": 1.0})


def test_a_new_flag_does_not_stop_an_older_run(tmp_path):
    """Its default, by row "" of RECIPES, is what the run had; another value is an error."""
    c = settings(tmp_path, iters=10)
    for step in (run := runs.Run(c, DATA, thing=Thing())):
        run.log(loss=1.0)

    def resumed(value, in_row=None):
        c = settings(tmp_path, iters=20)
        c.fields = c.fields | dict(gamma=flags.option(0.0, "new"))
        c.fields["gamma"].name, c.fields["gamma"].type = "gamma", float
        c.defaults = c.defaults | dict(gamma=0.0 if in_row is None else in_row)
        c.gamma = value
        return runs.Run(c, DATA, thing=Thing())
    assert resumed(0.0).step == 10 and resumed(5.0, in_row=5).step == 10
    for wrong in ((1.0,), (0.0, 5)):
        with pytest.raises(ValueError, match=f"gamma = {float((*wrong, 0.0)[1])}, not {wrong[0]}"):
            resumed(*wrong)


@pytest.mark.parametrize("change,words", [
    (dict(lr=0.1), "lr = 0.5, not 0.1"), (dict(seed=1), "seed = 0, not 1"),
    (dict(name="mnist"), "data = digits, not mnist"),
    (dict(method="ddim"), "checkpoint of ddpm.py")])
def test_a_changed_setting_is_named(change, words, tmp_path, monkeypatch, capsys):
    for step in (run := runs.Run(settings(tmp_path, iters=10), DATA, thing=Thing())):
        run.log(loss=torch.tensor(1.0))
    monkeypatch.setattr(files, "program", "ddpm.py")
    with pytest.raises(SystemExit) as stopped:
        runs.Run(settings(tmp_path, **change), DATA, thing=Thing())
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    runs.Run(settings(tmp_path, iters=40, minutes=3.0), DATA, thing=Thing())
    anew = runs.Run(settings(tmp_path, fresh=True, lr=0.1, iters=10), DATA, thing=Thing())
    assert list(anew)[0] == 1


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SAVE_EVERY", -1.0)
    thing = Thing()
    with pytest.raises(ValueError, match="update 17 is not finite"):
        for step in (run := runs.Run(settings(tmp_path), DATA, thing=thing)):
            thing.value = step
            run.log(loss=torch.tensor(math.nan if step >= 17 else 1.0))
    assert torch.load(tmp_path / "checkpoint.pt")["thing"]["value"] == 10


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="a weight after update 5"):
        for step in (run := runs.Run(settings(tmp_path, iters=5), DATA, net=net)):
            run.log(loss=torch.tensor(1.0))
            net.weight.data[0, 0] = math.nan
    assert not (tmp_path / "checkpoint.pt").exists()


def test_minutes_count_over_the_whole_run(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def train(minutes):
        done = 0
        c = settings(tmp_path, iters=1000, minutes=minutes)
        for step in (run := runs.Run(c, DATA, thing=Thing())):
            now[0] += 6.0
            done += 1
            run.log(loss=torch.tensor(1.0))
        return done
    assert train(1.0) == 10 and train(1.0) == 0 and train(1.5) == 5


# -------------------------------------------------------------------------------- the script's text
TEXT = '''"""Head."""
import math


def loss(x):
    """What it is."""
    return x ** 2  # squared
'''


@pytest.mark.parametrize("old,new,want", [
    ("", "", False),
    ("# squared", "# of course", False),  # comments
    ("What it is.", "Another word.", False), ('"""Head."""\n', "", False),  # docstrings
    ("    return", "\n    return", False), ("(x)", "(\\n        x)", False),  # form
    ("x ** 2", "x ** 4", True), ("import math", "import cmath", True),
    ("def loss", "def gain", True), ("return", "return =", False)])  # cannot be parsed
def test_a_text_differs_where_the_program_does(old, new, want):
    changed = TEXT.replace(old, new.replace("\\n", "\n")) if old else TEXT
    assert runs.differs(TEXT, changed) == runs.differs(changed, TEXT) == want
    for absent in (None, ""):
        assert not runs.differs(absent, TEXT) and not runs.differs(TEXT, absent)


def test_a_script_that_has_changed_does_not_pass_for_what_was_trained(tmp_path, capsys):
    def resumed(iters, text, **more):
        c = settings(tmp_path, iters=iters, **more)
        c.text = text
        run = runs.Run(c, DATA, thing=Thing())
        for step in run:
            run.log(loss=1.0)
        return run

    resumed(10, TEXT)
    assert (tmp_path / "script.py").read_text() == TEXT
    assert resumed(10, TEXT.replace("# squared", "")).step == 10
    changed = TEXT.replace("x ** 2", "abs(x)")
    with pytest.raises(ValueError, match="ddpm.py has changed since .* was trained: --fresh trains "
                                         "anew, --run DIR keeps both"):
        resumed(10, changed)
    assert (tmp_path / "script.py").read_text() == TEXT.replace("# squared", "")
    capsys.readouterr()
    assert resumed(20, changed).step == 20
    assert "what is left is trained by today's text" in capsys.readouterr().err
    assert (tmp_path / "script.py").read_text() == changed
    assert torch.load(tmp_path / "checkpoint.pt")["script"] == changed
    assert resumed(5, TEXT, fresh=True).step == 5
    assert "changed since" not in capsys.readouterr().err


def test_sampling_says_that_the_script_has_changed(tmp_path, capsys):
    c = script_settings(ddpm)
    config = {name: getattr(c, name) for name in flags.trained_fields(c)}
    path = checkpoint(tmp_path / "c.pt", config, script=TEXT, net={})
    c = script_settings(ddpm, checkpoint=path)
    c.text = TEXT
    runs.trained(c)
    assert not capsys.readouterr().err
    c.text = TEXT.replace("x ** 2", "abs(x)")
    runs.trained(c)
    assert "ddpm.py has changed since" in capsys.readouterr().err
    c = script_settings(ddim, checkpoint=path)  # of another method: not compared
    runs.trained(c, ("ddim", "ddpm"))
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------------ sheets
def test_sheets_are_due_after_20_seconds_and_1_2_4_8_minutes():
    seconds, due = 0.0, []
    for _ in range(6):
        seconds = runs.next_sheet(seconds)
        due.append(seconds)
    assert due == [20, 60, 120, 240, 480, 960]
    assert runs.next_sheet(19.9) == 20 and runs.next_sheet(20.0) == 60 == runs.next_sheet(59.9)


def sheets(tmp_path, monkeypatch, update, evaluation, until, x=None):
    """(seconds, samples) of the sheets of a run whose updates and evaluations take so long."""
    now, drawn = [0.0], []
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    c = settings(tmp_path, iters=10 ** 6, minutes=until / 60, batch=64)
    c.shape = (1, 4, 4)
    for step in (run := runs.Run(c, DATA, thing=Thing())):
        now[0] += update
        n = run.shows(20)
        if n:
            drawn.append((round(now[0]), n))
            now[0] += n * 20 * evaluation
            run.show(torch.zeros(n, 1, 4, 4) if x is None else x)
        run.log(loss=1.0)
    return drawn


def test_a_sheet_waits_until_a_share_of_the_time_pays_for_it(tmp_path, monkeypatch):
    # fast: by the length of an update 64 samples would cost 0.67 s, more than 0.03 of 20 s
    assert sheets(tmp_path / "a", monkeypatch, 0.1, 1e-5, 500) == [
        (20, 36), (60, 64), (120, 64), (240, 64), (480, 64)]
    # the first sheet tells that an evaluation costs a hundredth of a second: it took 3.2 s, and
    # four more samples are paid for after 4.0 s / 0.03
    slow = sheets(tmp_path / "b", monkeypatch, 0.3, 0.01, 1000)
    assert slow[0] == (20, 16) and slow[1] == (133, 4) and slow[2][0] == 240
    assert len(slow) > 3 and sum(n * 20 * 0.01 for _, n in slow) <= 0.03 * 1000
    # so slow that there is none in ten minutes, four samples an hour
    assert sheets(tmp_path / "c", monkeypatch, 60.0, 1.0, 600) == []


def test_a_resumed_run_keeps_the_rhythm_and_drops_later_sheets(tmp_path, monkeypatch):
    assert sheets(tmp_path, monkeypatch, 0.5, 1e-5, 70) == [(20, 9), (60, 64)]
    names = sorted(int(p.stem) for p in (tmp_path / "sheets").iterdir())
    assert names == [40, 120] and (tmp_path / "samples.png").exists()
    (tmp_path / "sheets" / "150.png").write_bytes(b"of a killed run")
    # 120 s of all are 50 s of this one
    assert [when for when, _ in sheets(tmp_path, monkeypatch, 0.5, 1e-5, 130)] == [50]
    assert sorted(int(p.stem) for p in (tmp_path / "sheets").iterdir()) == [40, 120, 240]
    c = settings(tmp_path, fresh=True)
    runs.Run(c, DATA, thing=Thing())
    assert not list((tmp_path / "sheets").iterdir())


def test_a_closing_sheet_that_is_owed_is_drawn_by_the_next_command(tmp_path, capsys):
    """Killed while the last one was drawn: there is one already, of before the end."""
    def ended(**more):
        c = settings(tmp_path, iters=5)
        for step in (run := runs.Run(c, DATA, thing=Thing())):
            run.log(loss=1.0)
        runs.end(c, run, 20)
        return c.sample

    assert ended() and ended()  # none yet
    sheet, model = tmp_path / "samples.png", tmp_path / "checkpoint.pt"
    sheet.write_bytes(b"")
    os.utime(sheet, (model.stat().st_mtime - 9,) * 2)
    assert ended()
    os.utime(sheet, (model.stat().st_mtime + 9,) * 2)
    assert not ended() and "already trained" in capsys.readouterr().out


def test_a_sheet_that_goes_wrong_is_a_warning(tmp_path, monkeypatch, capsys):
    bad = torch.full((4, 1, 4, 4), math.nan)
    assert sheets(tmp_path, monkeypatch, 0.1, 1e-5, 30, x=bad) == [(20, 36)]
    assert "the sheet's samples are not finite" in capsys.readouterr().err
    assert not (tmp_path / "samples.png").exists()

    def full(*given):
        raise OSError("samples.png cannot be written: no space")
    monkeypatch.setattr(runs.pictures, "save", full)
    assert sheets(tmp_path / "b", monkeypatch, 0.1, 1e-5, 30) == [(20, 36)]
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # another process draws it
    c = settings(tmp_path / "c")
    run = runs.Run(c, DATA, thing=Thing())
    run.start, run.due = 0.0, 0.0
    assert run.shows(20) == 0


# ------------------------------------------------------------------------------ threads, slowness
def test_a_resumed_run_computes_with_the_threads_it_began_with(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for step in (run := runs.Run(settings(tmp_path, iters=5), DATA, thing=Thing())):
        run.log(loss=1.0)
    assert json.loads((tmp_path / "config.json").read_text())["threads"] == 1
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["threads"] == 1
    torch.set_num_threads(2)
    runs.Run(settings(tmp_path, iters=10), DATA, thing=Thing())
    assert torch.get_num_threads() == 1
    assert "computes with 1 thread, as it began; OMP_NUM_THREADS=2" in capsys.readouterr().err


def test_updates_that_become_slow_are_told_once(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def train(*paces, iters):
        """So many updates of each number of seconds."""
        todo = [pace for pace, many in paces for _ in range(many)]
        c = settings(tmp_path, iters=iters)
        for step in (run := runs.Run(c, DATA, thing=Thing())):
            now[0] += todo.pop(0)
            run.log(loss=1.0)
            if step == 205:  # a sheet takes half a minute
                run.drawing = run.seconds, 20
                now[0] += 30
                run.show(torch.zeros(4, 1, 4, 4))
        assert not todo
        return capsys.readouterr().err.count("times as long as it did")

    assert train((0.1, 300), (0.3, 100), iters=400) == 0
    assert train((0.1, 200), (0.7, 100), iters=700) == 1
    assert train((3.0, 40), iters=740) == 1  # a resumed run knows how fast it was


# -------------------------------------------------------------------------------- several processes
def test_averaged_gradients_are_those_of_the_whole_batch(tmp_path):
    """Two processes over gloo, with a double backward in the loss, as R1 has."""
    program = tmp_path / "p.py"
    program.write_text("""
import sys, torch
sys.path.insert(0, sys.argv[1])
from common import draws, processes
torch.set_num_threads(1)

def gradients():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    net = net.double()
    x = torch.randn(6, 3, dtype=torch.float64)[draws.part(6)].requires_grad_()
    y = net(x)
    slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.square().mean() + slope.square().sum(1).mean()).backward()
    processes.average_gradients(net)
    return [p.grad for p in net.parameters()]

if __name__ == "__main__":
    processes.join(torch.device("cpu"))
    two = gradients()
    if processes.rank() == 0:
        torch.save(two, sys.argv[2])
    processes.leave()
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node=2", program, ROOT, tmp_path / "2.pt"], timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    here = {"__name__": "p", "sys": sys}
    argv, sys.argv = sys.argv, ["p.py", str(ROOT)]
    exec(program.read_text(), here)  # the whole batch, in this process
    sys.argv = argv
    for one, two in zip(here["gradients"](), torch.load(tmp_path / "2.pt")):
        assert one.abs().max() > 0 or one.numel() == 1
        assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_several_processes_stop_within_a_second_or_an_update(tmp_path):
    """Of slow updates they do not wait for the tenth: the launcher would end them meanwhile."""
    program = tmp_path / "p.py"
    program.write_text("""
import sys, time, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
from common import processes, runs
from test_runs import DATA, Thing, settings

processes.join(torch.device("cpu"))
for step in (run := runs.Run(settings(Path(sys.argv[2]), iters=1000), DATA, thing=Thing())):
    time.sleep(0.7)
    Path(sys.argv[2], f"{processes.rank()}-{step}").touch()
    run.log(loss=1.0)
""")
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                 "--nproc-per-node=2", program, ROOT, tmp_path / "run"],
                                env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "0-2").exists():
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) != 0
    assert 2 <= torch.load(tmp_path / "run" / "checkpoint.pt")["step"] <= 5
