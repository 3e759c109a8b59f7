"""A run in its folder: what comes before training, the loop's books, checkpoints, what follows.

    data = runs.begin(c)
    run = runs.Run(c, data, net=net, ema=ema, optimizer=optimizer)
    for step in run:
        x0, label, first = run.batch(step)
        ...
        run.log(loss=loss)
    runs.end(c, run)

It calls nothing back and knows no method: what is trained are objects with a state_dict.
"""
import ast
import contextlib
import copy
import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import draws, early, files, flags, gpu, pictures, processes
from common.data import NAMED, judgeable, load, same
from common.files import MOST, inputs, load_checkpoint, lock, naming, save_tensors, stop, unlock
from common.files import written
from common.processes import rank, world
from common.progress import progress


# ------------------------------------------------------------------------------------------ weights
class EMA:
    """The running mean of a network's parameters, and its buffers as they are.

    decay rises as (1 + n) / (10 + n) to `decay` with the updates n, lest early samples be noise.
    """

    def __init__(self, net, decay):
        self.net, self.decay = copy.deepcopy(net), decay
        self.net.eval().requires_grad_(False)
        device = next(net.parameters()).device
        # on CUDA it counts there, since a graph that is replayed runs no Python
        self.updates = gpu.number(0, device if device.type == "cuda" else "cpu")

    @torch.no_grad()
    def update(self, net):
        """After each update of net."""
        mine, theirs = list(self.net.parameters()), list(net.parameters())
        self.updates += 1
        if self.updates.is_cuda:
            share = (9 / (10 + self.updates)).clamp(min=1 - self.decay)  # 1 - decay
            steps = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(mine, steps)
        else:
            n = int(self.updates)
            torch._foreach_lerp_(mine, theirs, 1 - min(self.decay, (1 + n) / (10 + n)))
        for mine, theirs in zip(self.net.buffers(), net.buffers()):
            mine.copy_(theirs)

    def state_dict(self):
        return dict(net=self.net.state_dict(), updates=int(self.updates))

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.updates.fill_(state["updates"])


def learnable(net):
    """The parameters that an optimizer gets: those that require gradients."""
    return [p for p in net.parameters() if p.requires_grad]


def set_rate(optimizer, rate):
    """The learning rate of this update; in a group with a `scale` of its own, that much of it.

    On CUDA it is a tensor that stays where it is, for a graph to read.
    """
    for group in optimizer.param_groups:
        value = rate * group.get("scale", 1)
        if not group["capturable"] or not group["params"]:
            group["lr"] = value
        elif isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = gpu.number(float(value), group["params"][0].device)


# -------------------------------------------------------------------------------------- checkpoints
def compare(c, path, saved, now):
    """ValueError if a setting or the data, `now` by name, is not what the checkpoint has.

    A flag that the checkpoint does not know, since it is younger, had its default then.
    """
    known = saved["config"] | saved["data"]
    known |= dict(size=known["shape"][-1], classes=sorted(known["classes"]))
    for name, value in now.items():
        if name in known:
            was = known[name]
        else:
            was = flags.default(c, name) if name in c.defaults else None
        if flags.text(value) != flags.text(was):
            same = f"--{name} {flags.text(was)}" if name in ("data", "size", "classes") else \
                "the same flags"
            raise ValueError(f"{path} was trained with {name} = {flags.text(was)}, not "
                             f"{flags.text(value)}: give {same}, another --run or --checkpoint, or "
                             "train with --fresh to start over")


def load_states(saved, path, **objects):
    """Give each object the state of its name from a checkpoint.

    ValueError if one does not fit, before any of them is changed.
    """
    try:
        states = {name: _fitting(saved[name], thing) for name, thing in objects.items()}
        for name, thing in objects.items():
            thing.load_state_dict(states[name])
    except Exception:
        raise ValueError(f"{path} is damaged, or does not fit this version of the network") \
            from None


def _fitting(state, thing):
    """An object's state from a file, in the form of what it will replace; else a ValueError."""
    if isinstance(thing, torch.optim.Optimizer):
        return _moments(state, thing)
    if isinstance(thing, (torch.nn.Module, EMA)) and not _alike(state, thing.state_dict()):
        raise ValueError("another form")
    return state


def _alike(a, b):
    """Whether two values have one form: names, nesting, shapes and types; numbers are counts."""
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and \
            (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in b)
    return type(a) is type(b) is int and 0 <= a < MOST


def _moments(saved, optimizer):
    """An Adam's state from a file, laid out as its parameters are; ValueError if it does not fit.

    Adam compares no shapes: it would write beyond the end of a short tensor. It reads memory in the
    parameter's order, whatever the strides of a moment say, so each is copied into that order. What
    a group says beside its parameters, the rates among it, is the script's and not the file's.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [g["params"] for g in groups]:
        raise ValueError("other groups")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, moments in saved["state"].items():  # none of parameters without a gradient so far
        p, step = parameters[i], moments["step"]
        if type(i) is not int or i < 0 or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError("other names")
        if (step.shape, step.dtype) != ((), torch.float32) or not 0 <= step < MOST:
            raise ValueError("step")
        state[i] = dict(step=step)
        for name in ("exp_avg", "exp_avg_sq"):
            if (moments[name].shape, moments[name].dtype) != (p.shape, p.dtype):
                raise ValueError(name)
            state[i][name] = torch.empty_like(p, device="cpu").copy_(moments[name])
    return dict(state=state, param_groups=groups)


def _younger(c, path, saved, names):
    """Say which of these flags a checkpoint does not know, and what they are worth then."""
    missing = [name for name in names if name not in saved["config"] and name in c.defaults]
    if missing and rank() == 0:
        worth = ", ".join(f"--{name.replace('_', '-')} {flags.text(flags.default(c, name))}"
                          for name in missing)
        print(f"{path} is older than some flags, and goes by {worth}", file=sys.stderr)


def trained(c, methods=None, also=()):
    """c with the settings of the checkpoint to sample from, and the checkpoint: c, saved.

    It is --checkpoint or the run's own. methods: the scripts whose checkpoints will do, by default
    c.method; also: names of what another script's checkpoint has beside this one's flags. Sets
    c.shape and c.labels too.
    """
    c = copy.copy(c)
    c.checkpoint = c.checkpoint or str(c.run / "checkpoint.pt")
    with inputs():
        saved = load_checkpoint(c.checkpoint, methods or (c.method,))
        given = dict(size=c.size, classes=sorted(c.classes))  # 0 and none ask for nothing
        if c.data in NAMED or "content" not in saved["data"]:
            given["data"] = c.name  # else who reads the pictures compares them
        compare(c, c.checkpoint, saved, {k: v for k, v in given.items() if v and k in c.given})
        names = [name for name in flags.trained_fields(c) if name != "seed"]  # samples have theirs
        for name in names:
            setattr(c, name, _setting(c, saved, name))
        if saved["method"] == c.method and "net" in saved:  # not of a first stage alone
            _younger(c, c.checkpoint, saved, names)
        for name in also:
            if name in saved["config"]:
                setattr(c, name, _setting(c, saved, name))
    if "checkpoint" in c.given and "run" not in c.given:
        c.run = _place(c, saved)
    c.data = c.data if "data" in c.given else saved["source"]
    c.chosen = tuple(saved["data"].get("chosen", c.classes))  # by --classes
    c.content = saved["data"].get("content")
    c.name, c.classes = saved["data"]["data"], tuple(saved["data"]["classes"])
    c.shape, c.labels = tuple(saved["data"]["shape"]), len(c.classes) if c.conditional else 0
    c.updates, c.spent = saved["step"], saved["seconds"] / 60
    c.size = c.shape[-1] if len(c.shape) == 3 else 0
    flags.brought(c)
    c.vocabulary = tuple(saved["data"].get("vocabulary", ()))
    c.longest = saved["data"].get("longest", 0)
    flags.resolve(c)
    flags.rules(c)
    if files.program and not c.train and own_threads(c):
        most = torch.get_num_threads()
        early.choose()
        if torch.get_num_threads() < most:
            print(early.told(), file=sys.stderr)
    if saved["method"] == c.method and differs(saved.get("script"), c.text):
        print(f"{c.method}.py has changed since {c.checkpoint} was trained: samples are drawn by "
              "today's text", file=sys.stderr)
    if not c.sheet:  # few points show no shape
        c.sheet = 64 if len(c.shape) == 3 else 1000
    return c, saved


def _place(c, saved):
    """The folder for what is drawn from --checkpoint's file: its own run's, or one of its name."""
    folder, file = os.path.split(os.path.realpath(c.checkpoint))
    above, here = os.path.basename(folder), os.getcwd()
    if file == "checkpoint.pt" and saved["method"] == c.method:
        inside = folder.startswith(os.path.join(here, ""))
        return Path(os.path.relpath(folder) if inside or folder == here else folder)
    called = above if file == "checkpoint.pt" else f"{above}-{Path(file).stem}"
    return Path("runs") / f"{c.method}-of-{called}"


def _setting(c, saved, name):
    """One setting from a checkpoint, checked; where it does not know the flag, the default."""
    if name not in saved["config"]:
        return flags.default(c, name)
    value = saved["config"][name]
    if name in c.fields and saved["method"] == c.method:
        return flags.checked(c.fields[name], value, c.checkpoint)
    # another script may have more choices
    value = tuple(value) if isinstance(value, list) else value
    if not isinstance(value, type(getattr(c, name, ""))):
        raise ValueError(f"{c.checkpoint} is damaged: {name} = {value!r}")
    return value


def differs(old, new):
    """Whether two texts of a script are different programs; comments and docstrings are none.

    They are parsed by the Python that runs, and nothing is executed. A text that is absent or that
    cannot be parsed counts as equal.
    """
    if old == new:
        return False
    trees = []
    for text in (old, new):
        try:
            tree = ast.parse(text or "?")
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return False
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                if ast.get_docstring(node, clean=False) is not None:
                    del node.body[0]
        trees.append(ast.dump(tree))
    return trees[0] != trees[1]


def initialise(c, classes, states):
    """Give new networks the weights of --init's file, the mean ones where it has them.

    classes: of the data; states: as Run has them, by the checkpoint's names. Labels and words that
    the file knows keep their row, others start anew. Returns what to say of it. ValueError for a
    file that does not fit.
    """
    saved = load_checkpoint(c.init, (c.method,), flags.INIT)
    known = list(saved["data"]["classes"]) if saved["config"].get("conditional") else []
    known_words = saved["data"].get("vocabulary", [])
    for name, thing in states.items():
        if isinstance(thing, torch.nn.Module):
            try:
                weights = saved["ema"]["net"] if name == "net" else saved[name]
                weights = _fitted(weights, thing.state_dict(), "label.weight", known, classes)
                weights = _fitted(weights, thing.state_dict(), "text.word.weight",
                                  ["", *known_words], ["", *c.vocabulary])
                thing.load_state_dict(_long(weights, thing.state_dict(), "text.place"))
            except Exception:  # as in load_states
                raise ValueError(_unfitting(c, saved)) from None
    for thing in states.values():
        if isinstance(thing, EMA):
            thing.net.load_state_dict(states["net"].state_dict())
    said = f"begins with the weights of {c.init}, after {saved['step']} updates"
    for what, names, there in (("labels", classes if c.labels else (), known),
                               ("words", c.vocabulary, known_words)):
        anew = [name for name in names if name not in {*there}]
        if anew:
            said += f"; {what} that start anew: {', '.join(anew[:10])}{' ...' * (len(anew) > 10)}"
    return said


def _fitted(weights, fresh, ending, known, names):
    """A file's weights with the rows of embeddings, keys of that ending, for these names.

    Known names keep their rows, the others have those of the fresh weights; a last row, of no name,
    is the file's where it has one.
    """
    result = {key: value for key, value in weights.items() if not key.endswith(ending)}
    for key, rows in fresh.items():
        if key.endswith(ending):
            rows = rows.clone()
            place = {name: i for i, name in enumerate(known)}
            for i, name in enumerate(names):
                if name in place:
                    rows[i] = weights[key][place[name]]
            if known and len(rows) > len(names):
                rows[-1] = weights[key][-1]  # no label
            result[key] = rows
    return result


def _long(weights, fresh, name):
    """A file's weights with the rows of one tensor, places in a text, as many as the fresh has."""
    if name not in weights or name not in fresh:
        return weights
    rows = fresh[name].clone()
    many = min(len(rows), len(weights[name]))
    rows[:many] = weights[name][:many]
    return weights | {name: rows}


def _unfitting(c, saved):
    """Why the weights of --init's file do not fit, and what to do."""
    shape = tuple(saved["data"]["shape"])
    if len(shape) != len(c.shape) or shape[0] != c.shape[0]:
        return (f"--init {c.init} was trained on data of shape {shape}, and {c.data} has "
                f"{c.shape}: give other data or another checkpoint")
    for name in sorted(c.given):
        was = saved["config"].get(name)
        if c.fields[name].metadata["of_model"] and flags.text(was) != flags.text(getattr(c, name)):
            return (f"--{name.replace('_', '-')} {flags.text(getattr(c, name))} does not fit "
                    f"--init {c.init}, which has {flags.text(was)}: leave it out")
    if shape != c.shape:
        return (f"--size {c.shape[-1]} does not fit --init {c.init}, whose pictures have a side of "
                f"{shape[-1]}: leave it out")
    return f"{c.init} is damaged, or does not fit this version of the network"


def restored(c, net, saved):
    """The module `net` with the checkpoint's mean weights on c.device, ready to sample from."""
    ema = EMA(net.to(c.device), c.ema)
    with inputs():
        load_states(saved, c.checkpoint, ema=ema)
    return torch.compile(ema.net) if c.compile else ema.net


# --------------------------------------------------------------------------------- before and after
def load_data(c, split="train"):
    """The Dataset that the flags name; ends the program with one line where it cannot be had."""
    if rank() > 0:  # rank 0 fetches and caches first
        processes.barrier()
    with inputs():
        data = load(c.data, c.data_root, c.size or None, c.chosen or None, split,
                    most=flags.most(c))
        same(vars(c).get("content"), data, c.checkpoint)  # where a checkpoint says which
    if rank() == 0:
        processes.barrier()
    return data


def begin(c):
    """Meet the other processes, load the data, set c.shape and c.labels, and seed. The Dataset.

    From here to `end`, or until the loop ends early, no other program can train in c.run.
    """
    if c.batch % world():
        stop(f"--batch {c.batch} cannot be split evenly among {world()} processes")
    processes.join(c.device)
    data = load_data(c)
    if c.evaluate:
        with inputs():
            judgeable(data, c.n or 1000)
    if c.conditional and "conditional" in c.given and len(data.classes) < 2:
        stop(f"--conditional needs data with at least two classes; {c.data} has "
             f"{len(data.classes)}")
    if len(data.shape) == 3 and data.levels() < 4 and rank() == 0:
        print(f"nearly all values of {c.data} are of {data.levels()} levels among 256: if these "
              "are pictures that were scaled twice, samples will look empty", file=sys.stderr)
    c.conditional = c.conditional and len(data.classes) > 0  # --init's file may have had labels
    c.shape, c.labels = tuple(data.shape), len(data.classes) if c.conditional else 0
    _captions(c, data)
    _lock(c)
    torch.manual_seed(c.seed)  # the networks' first weights
    if files.program and own_threads(c):
        early.choose()
    return data


def _lock(c):
    """Lock the run, or end all processes, of which one says why."""
    fault = None
    if rank() == 0:
        try:
            lock(c.run)
        except (OSError, ValueError) as what:
            fault = what
    if processes.summed(torch.tensor(int(fault is not None), device=c.device)):
        if fault:
            stop(fault)
        raise SystemExit(2)


def own_threads(c):
    """Whether threads of this process compute, as many as it likes: one process, and no GPU."""
    return c.device.type == "cpu" and world() == 1


def _captions(c, data):
    """Set c.vocabulary and c.longest, words of a caption at most, where captions are learnt."""
    learns = vars(c).get("captions", False)  # one script has this flag
    if learns and data.captions is None and "captions" not in c.given and c.init:
        stop(f"--init {c.init} is a model that reads captions, and {c.data} has none: give data "
             "with captions, or another checkpoint")
    if learns and data.captions is None:
        stop(f"--captions needs data with captions, as `words` or a folder with name.txt beside "
             f"name.png, and {c.data} has none")
    c.vocabulary, c.longest = (), 0
    if learns:
        c.vocabulary, c.longest = tuple(data.vocabulary), data.captions.shape[1]
    elif "captions" in c.fields and data.captions is not None and rank() == 0:
        print(f"{c.data} has captions: --captions learns them", file=sys.stderr)


def end(c, run, evaluations):
    """After training: loss.png, a word if nothing was left to train. Other ranks than 0 end here.

    Where the run would be left without a sheet, c.sample asks for one, whose samples need so many
    evaluations of the network each: as many as fit into a fifth of the training's time.
    """
    processes.leave()
    if rank() != 0:
        raise SystemExit(0)
    unlock()
    with inputs():
        pictures.curves(c.run)
    anything = run.step > run.began
    if not anything:
        print(f"{c.run} is already trained: give more --iters or --minutes, or --fresh to start "
              "over")
    if not c.sample:
        c.sheet = run.closing(evaluations)  # --n is for --evaluate
    sheet = c.run / "samples.png"
    # the closing one may be missing, or one of those drawn before the end
    owed = not sheet.exists() or sheet.stat().st_mtime < run.path.stat().st_mtime
    c.sample = c.sample or anything or owed


# ------------------------------------------------------------------------------------------ the run
LOG_EVERY = 10  # updates averaged in a row of metrics.csv
SAVE_EVERY = 60.0  # seconds
FIRST_SHEET, SHARE = 20.0, 0.03  # seconds; of them, what sheets may take
CLOSING, LEAST = 0.2, 3.0  # of the seconds, what the closing sheet may take; at least so many
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
          if hasattr(signal, name)]  # Ctrl-C, kill, a closed terminal; Windows knows no SIGHUP
LAP, SLOWER = 10.0, 4.0  # seconds of updates that are compared; times as long is worth a word
FEW = 200  # updates, with fewer of which nothing is learned


def next_sheet(seconds):
    """When the sheet after so many seconds of training is due: at 20 s, 1, 2, 4, 8, ... minutes."""
    due = FIRST_SHEET
    while due <= seconds:
        due = 3 * due if due == FIRST_SHEET else 2 * due
    return due


class Run:
    """A training run in its folder: `for step in run:` counts updates, from the checkpoint's on.

    c: from flags.parse, after begin; data: the Dataset; share: of c.minutes, for a method in stages
    with a run each; tell: whether to say what was read; only: of a stage that another one follows
    the flags that it reads; states: what a checkpoint holds beside the step, each with state_dict
    and load_state_dict. Inside the loop call run.log(loss=...) once in each update. The loop ends
    at c.iters updates, after c.minutes of training in all, or at Ctrl-C, SIGTERM or SIGHUP (then
    with a checkpoint and exit status 130, once the update is done). A value that is not finite ends
    it too, naming the update, and the last good checkpoint stays.
    """

    def __init__(self, c, data, share=1.0, tell=True, only=(), **states):
        self.c, self.data, self.states, self.only = c, data, states, only
        self.path, self.table = c.run / "checkpoint.pt", c.run / "metrics.csv"
        self.config = {name: getattr(c, name) for name in only or flags.trained_fields(c)}
        self.about = dict(data=c.name, shape=list(data.shape), classes=list(data.classes),
                          pictures=len(data), chosen=list(c.chosen))
        content = data.content()
        if content:
            if only or not c.vocabulary:  # then captions are not learnt
                content.pop("captions", None)
            self.about["content"] = content
        if c.vocabulary and not only:
            self.about |= dict(vocabulary=list(c.vocabulary), longest=c.longest)
        self.step, self.seconds, self.share = 0, 0.0, share
        self.limit = 60 * share * c.minutes or math.inf
        self.start, self.began_at = None, 0.0  # the clock at second 0; seconds when this began
        self.due, self.cost, self.paid, self.drawing = 0.0, None, 0.0, None  # of sheets: see shows
        self.columns, self.header, self.window, self.last = {}, [], [], {}
        self.interrupted = False
        self.paces, self.lap = [], None  # seconds of an update, and since when: see _slower
        with inputs():
            if self.path.exists() and not c.fresh:
                saved = load_checkpoint(self.path, (c.method,))
                now = self.config | self.about | dict(classes=sorted(data.classes))
                free = {"iters", "minutes", "content", "chosen"}
                if content:  # which tells captions apart
                    free |= {"vocabulary", "longest"}
                if content and "content" in saved["data"]:
                    free.add("data")  # whatever it is called
                if now["shape"] == saved["data"]["shape"] and now["classes"] == sorted(
                        saved["data"]["classes"]):
                    same(saved["data"].get("content"), data, self.path, ", another --run, or "
                         f"--fresh to start over; --init {self.path} in another --run goes on from "
                         "its weights")
                compare(c, self.path, saved, {name: value for name, value in now.items()
                                              if name not in free})
                load_states(saved, self.path, **states)
                _younger(c, self.path, saved, self.config)
                self.step, self.seconds = saved["step"], saved["seconds"]
                self.paces.append(self.seconds / max(1, self.step))
                if own_threads(c) and saved.get("threads"):
                    said = early.restore(saved["threads"])
                    if said and (only or not self._finished()):
                        print(f"{c.run} {said}", file=sys.stderr)
                self._changed(saved.get("script"))
            elif c.init:
                said = initialise(c, data.classes, states)
                if rank() == 0:
                    print(f"{c.run} {said}", file=sys.stderr)
            self.began = self.step
            if self._agree(self.step, -self.step) != [self.step, -self.step]:
                raise ValueError(f"the processes found different checkpoints in {c.run}: give a "
                                 "folder that all of them share")
            if rank() == 0:
                self._begin()
                if tell and not self._finished():
                    self._tell()
                if self.step > 0 and not self._finished():
                    print(f"{c.run} goes on after update {self.step}", file=sys.stderr)

    def _changed(self, script):
        """Say that the script is another one than trained the run; an error if that was all."""
        if not differs(script, self.c.text):
            return
        changed = f"{self.c.method}.py has changed since {self.c.run} was trained"
        if self._finished() and not self.only:
            stop(f"{changed}: --fresh trains anew, --run DIR keeps both")
        if rank() == 0:
            print(f"{changed}: what is left is trained by today's text", file=sys.stderr)

    def _tell(self):
        """Say what was read, and what was taken where there is no GPU."""
        print(f"{self.c.data}: {self.data.told()}", file=sys.stderr)
        threads = early.told() if own_threads(self.c) and self.began == 0 else ""
        for line in (flags.full_recipe(self.c, self.data.capped), threads):
            if line:
                print(line, file=sys.stderr)

    def _begin(self):
        """Write config.json and script.py, and drop what lies after the last checkpoint.

        That is what a killed run logged: it will be computed again.
        """
        import numpy
        for name in (self.path.name, self.table.name, "config.json", "script.py", "loss.png"):
            for left in self.c.run.glob(f".*-{name}"):  # .PID-name, by one that was killed
                if left.name[1:].removesuffix(f"-{name}").isdigit():
                    left.unlink(missing_ok=True)
        inner = ("given", "sheet", "fields", "defaults", "recipes", "instead", "shape", "text")
        settings = {name: value for name, value in vars(self.c).items() if name not in inner}
        versions = dict(python=sys.version.split()[0], torch=torch.__version__,
                        numpy=numpy.__version__)
        settings |= dict(data_shape=self.about["shape"], versions=versions, processes=world(),
                         threads=torch.get_num_threads(), command=" ".join(sys.argv))
        with written(self.c.run / "config.json") as file:
            file.write_text(json.dumps(settings, indent=2, default=str) + "\n")
        with written(self.c.run / "script.py") as file:
            file.write_text(self.c.text, encoding="utf-8")
        for sheet in (self.c.run / "sheets").glob("*.png"):
            if self.step == 0 or sheet.stem.isdigit() and int(sheet.stem) > self.step:
                sheet.unlink()
        if self.step == 0:
            self.path.unlink(missing_ok=True)
            self.table.unlink(missing_ok=True)
        elif self.table.exists():
            self.header, rows = self._rows()
            if self.header:
                self._rewrite([row for row in rows if int(row["step"]) <= self.step])

    # ------------------------------------------------------------------- what an update reads
    def batch(self, step, drop=0.0):
        """This process's part of update `step`'s batch, on c.device: x0, label, first.

        x0: in [-1, 1], (b, C, H, W) or (b, 2); label: int64 (b,), of which a share `drop` and the
        pictures without a class have c.labels, "no label"; None where none are learnt. first: the
        number of its first sample in the whole batch.
        """
        c = self.c
        index, flip = self.index(step)
        x0, label = self.data.batch(index, c.device, flip if c.flip else None)
        label = draws.drop_labels(label, c, step, drop) if c.labels else None
        return x0, label, draws.part(c.batch).start

    def index(self, step):
        """Which pictures those are, int64 (b,), and which of them are mirrored, bool (b,)."""
        c, mine = self.c, draws.part(self.c.batch)
        index = draws.batch_index(len(self.data), c.batch, c.seed, step)[mine]
        if not c.flip:
            return index, torch.zeros(len(index), dtype=torch.bool)
        return index, draws.flips(c, step)[mine]

    def spread(self, step):
        """One u in [0, 1) for each sample of this process's part, evenly spread: float32 (b,)."""
        u = draws.spread(self.c, step)[draws.part(self.c.batch)].float()
        return gpu.sent(u, self.c.device)

    # ----------------------------------------------------------------------------- the loop
    def _finished(self):
        return self.step >= self.c.iters or self.seconds >= self.limit

    def __iter__(self):
        if self._finished():
            return
        from tqdm import tqdm
        # what is ignored, as by nohup, stays so
        handlers = {s: signal.signal(s, self._interrupt) for s in ENDING
                    if signal.getsignal(s) is not signal.SIG_IGN}
        first, before, saved_at = self.step, self.seconds, self.seconds
        self.start = time.monotonic() - self.seconds
        self.due = next_sheet(self.seconds)
        self.began_at = before
        done = interrupted = paced = False
        samples = "images" if len(self.c.shape) == 3 else "points"
        asked, heard, every = self.step, self.seconds, 1  # when the processes last agreed
        terminal = sys.stderr.isatty()
        bar = progress(text=str(self.c.run), leave=True, total=self.c.iters, initial=self.step,
                       disable=rank() != 0,
                       bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}")
        fault = None
        lines = [bar]  # on a terminal two, where one is too short for all the numbers
        try:
            while not (done or interrupted):
                self.step += 1
                yield self.step
                if not paced:  # the pace is told by the first updates, not by their launches
                    gpu.caught_up(self.c.device)
                self.seconds = time.monotonic() - self.start
                logs = self.step % LOG_EVERY == 0
                if logs:
                    rate = (self.step - first) / max(self.seconds - before, 1e-9)
                    left = min((self.c.iters - self.step) / rate, self.limit - self.seconds)
                    where = f"{tqdm.format_interval(max(0, left))} left, " \
                            f"{rate * self.c.batch:.0f} {samples}/s"
                    self._slower()
                    numbers = self._flush()
                    if len(numbers) > 40 and terminal and not bar.disable:
                        if len(lines) == 1:
                            lines.append(tqdm(bar_format="{desc}", position=1, dynamic_ncols=True))
                        lines[1].set_description_str(numbers)
                        numbers = ""
                    bar.set_postfix_str(f"{where}, {numbers}".removesuffix(", "), refresh=False)
                bar.update()
                if not paced:
                    paced = self._pace(first, before)
                # several processes stop at the same update, and agree on it about once a second
                ready = self.step >= min(self.c.iters, asked + every)
                if world() == 1 or ready:
                    ms = 1000 * (self.seconds - heard) / (self.step - asked)
                    done, interrupted, ms = self._agree(self._finished(), self.interrupted, ms)
                    asked, heard = self.step, self.seconds
                    every = max(1, min(LOG_EVERY, int(1000 / max(1, ms))))
                if done:  # by minutes, maybe: a bar that is full is at its end
                    bar.total = self.step
                if done or interrupted or logs and self.seconds - saved_at > SAVE_EVERY:
                    self._flush()
                    self.save()
                    saved_at = self.seconds
        except FloatingPointError as what:
            fault = what
        finally:
            for line in lines:
                line.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
            if not done:  # else another Run may follow
                unlock()
        if fault:
            kept = f"; {self.path} holds the last good state" if self.path.exists() else ""
            stop(f"{fault} is not finite{kept}. A smaller --lr usually helps, or --precision fp32")
        if interrupted:
            with contextlib.suppress(OSError):  # the terminal may be gone
                if rank() == 0:
                    print(f"interrupted at update {self.step}; the same command goes on from "
                          "there", file=sys.stderr)
            raise SystemExit(130)

    def _pace(self, first, before):
        """Once the first updates tell the pace: say it where too few will fit. Whether it is told.

        The very first one is slower, and counts only where three of them take long.
        """
        done = self.step - first
        if done == 1:
            self.warm = self.seconds
        if done < 3 or done < 10 and self.seconds - before < 5:
            return False
        each = max(1e-9, (self.seconds - self.warm) / (done - 1))
        fit = self.step + int((self.limit - self.seconds) / each) if math.isfinite(self.limit) \
            else self.c.iters
        if fit >= min(FEW, self.c.iters):
            return True
        enough = min(FEW, self.c.iters) - self.step
        minutes = math.ceil((self.seconds + each * enough) / 60 / self.share)
        widths = [name for name in self.only if name.startswith("width")] or ["width"]
        faster = [f"--{name.replace('_', '-')} {getattr(self.c, name) // 2}"
                  for name in (*widths, "batch") if getattr(self.c, name, 0) > 16]
        side = self.c.shape[-1] if len(self.c.shape) == 3 else 0
        faster += [f"--size {side // 2}"] if side >= 32 else []
        self.warn(f"at {each:.1f} s each only {fit} updates fit into {self.limit / 60:.3g} "
                  f"minutes, and fewer than {FEW} learn little: give --minutes {minutes}"
                  + (f", or with --fresh {' or '.join(faster)}" if faster else ""))
        return True

    def _slower(self):
        """Say once that updates take several times as long as they did, by laps of LAP seconds.

        A lap is compared with the two before it, since a method's own phases differ too; the
        updates up to the first row are of none: what is done once is in them.
        """
        now = self.seconds - self.paid, self.step
        self.lap = self.lap or now
        seconds, updates = now[0] - self.lap[0], now[1] - self.lap[1]
        if seconds < LAP:
            return
        each, before = seconds / updates, min(self.paces[-2:], default=math.inf)
        if each > SLOWER * before:
            remedy = "; with OMP_NUM_THREADS=1 before the same command it may go on faster"
            self.warn(f"an update takes {each:.2g} s, {each / before:.0f} times as long as it did: "
                      "other programs may keep the processor busy"
                      + (remedy if own_threads(self.c) and torch.get_num_threads() > 1 else ""))
            now = math.inf, 0  # once
        self.lap = now
        self.paces.append(each)

    def _interrupt(self, number, frame):
        # a second Ctrl-C does not wait for the update to end
        if self.interrupted and number == signal.SIGINT:
            raise SystemExit(130)
        self.interrupted = True

    def _agree(self, *numbers):
        """The largest of each number among the processes."""
        if world() == 1:
            return list(numbers)
        largest = torch.tensor([int(n) for n in numbers], device=self.c.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    # ---------------------------------------------------------------------- what it leaves
    def log(self, **values):
        """One update's numbers: averaged over LOG_EVERY updates they are a row of metrics.csv.

        Scalars (0-d tensors or floats), or vectors (k,), which become the columns name_1 to name_k.
        The same names in each update; who changes them between two runs of one folder finds the
        columns of both, with nothing where there was nothing.
        """
        columns, numbers = {}, []
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                value = gpu.number(float(value), self.c.device)
            value = value.detach().to(self.c.device, torch.float32)
            many = range(1, value.numel() + 1)
            columns[name] = [f"{name}_{i}" for i in many] if value.ndim else [name]
            numbers.append(value.reshape(-1))
        if self.window and columns != self.columns:
            raise ValueError(f"run.log has {', '.join(columns)} in update {self.step}, and before "
                             f"{', '.join(self.columns)}: log the same names in each update")
        self.columns = columns
        self.window.append(torch.cat(numbers))

    def _flush(self):
        """Write the row of the updates since the last one, and return it as text.

        FloatingPointError names the first update with a value that is not finite.
        """
        if not self.window:
            return ""
        table = torch.stack(self.window)
        if world() > 1:
            dist.all_reduce(table)
        table = table.cpu().double() / world()
        bad = (~table.isfinite()).any(1).nonzero()
        if len(bad):
            first = self.step - len(table) + 1
            raise FloatingPointError(f"the loss of update {first + int(bad[0])}")
        self.window = []
        means = table.mean(0).tolist()
        names = [column for columns in self.columns.values() for column in columns]
        if rank() == 0:
            row = dict(zip(names, (f"{m:.9g}" for m in means)))
            with inputs():
                self._write(dict(step=self.step, seconds=f"{self.seconds:.2f}") | row)
        means = iter(means)
        self.last = {n: [next(means) for _ in columns] for n, columns in self.columns.items()}
        shown = []
        for name, numbers in self.last.items():
            if len(numbers) == 1:
                shown.append(f"{name} {numbers[0]:.4f}")
            else:
                shown.append(f"{name} " + " ".join(f"{x:.2f}".removeprefix("0") for x in numbers))
        return ", ".join(shown)

    def _write(self, row):
        """Add a row to metrics.csv; for names that its header lacks, write it with a longer one."""
        there = self.table.exists()
        new = [name for name in row if name not in self.header]
        if new or not there:
            old = self._rows()[1] if there else []
            self.header += new
            self._rewrite(old)
        with naming(self.table), open(self.table, "a", newline="") as out:
            csv.DictWriter(out, self.header).writerow(row)

    def _rows(self):
        """The header and the rows of metrics.csv; what is no table is put aside, with a word."""
        try:
            return pictures.table_of(self.table)
        except ValueError as fault:
            aside = self.table.with_name(f"metrics-before-{self.step}.csv")
            os.replace(self.table, aside)
            print(f"{fault}: it is kept as {aside}, and a new one begins", file=sys.stderr)
            return [], []

    def _rewrite(self, rows):
        """Write metrics.csv anew, with these rows."""
        with written(self.table) as file, open(file, "w", newline="") as out:
            table = csv.DictWriter(out, self.header)
            table.writeheader()
            table.writerows(rows)

    def shows(self, evaluations):
        """How many samples a sheet may have now; 0 where none is due, or another process draws it.

        evaluations: of the network for each sample. A sheet is due after 20 s and then 1, 2, 4, 8,
        ... minutes of training, and waits until SHARE of the seconds so far pay for it and those
        before; so slow machines draw fewer samples.
        """
        if rank() != 0:
            return 0
        if time.monotonic() - self.start < self.due:
            return 0
        gpu.caught_up(self.c.device)  # what it still has to do is no sheet's time
        seconds = time.monotonic() - self.start
        cost = self.cost  # seconds of an evaluation of one sample
        if cost is None:  # an update is worth three evaluations of its batch
            update = (seconds - self.began_at) / (self.step - self.began)
            cost = update / (3 * self.c.batch)
        for n in (64, 36, 16, 9, 4) if len(self.c.shape) == 3 else (1000, 250):
            if self.paid + n * evaluations * cost <= SHARE * seconds:
                self.drawing = seconds, n * evaluations
                return n
        return 0

    def closing(self, evaluations):
        """How many samples the closing sheet has: CLOSING of the seconds must pay for them."""
        budget = max(LEAST, CLOSING * self.seconds)
        cost = self.cost
        if cost is None:  # as in shows
            cost = self.seconds / max(1, self.step) / (3 * self.c.batch)
        sizes = (64, 36, 16, 9, 4) if len(self.c.shape) == 3 else (1000, 250, 50)
        fitting = [n for n in sizes if n * evaluations * cost <= budget]
        n = fitting[0] if fitting else sizes[-1]
        if n < sizes[0] and self.step > self.began:
            print(f"closing sheet: {n} samples instead of {sizes[0]}, to take at most a fifth of "
                  "the training's time", file=sys.stderr)
        return n

    def show(self, x):
        """Keep a sheet of samples x (n, ...), as samples.png and sheets/<update>.png.

        What goes wrong with it is a warning: training goes on.
        """
        began, evaluations = self.drawing
        if x.isfinite().all():  # which waits for them
            try:
                pictures.save(self.c.run / "sheets" / f"{self.step}.png", x)
                pictures.save(self.c.run / "samples.png", x)
            except OSError as fault:
                self.warn(fault)
        else:
            self.warn("the sheet's samples are not finite")
        seconds = time.monotonic() - self.start
        self.cost, self.paid = (seconds - began) / evaluations, self.paid + seconds - began
        self.due = next_sheet(seconds)

    def warn(self, message):
        """Say it above the bar, on stderr; None is nothing to say.

        run.last, {name: [means]}, is the row written last, {} before.
        """
        if message and rank() == 0:
            from tqdm import tqdm
            with contextlib.suppress(OSError):  # the terminal may be gone
                tqdm.write(f"update {self.step}: {message}", file=sys.stderr)

    def save(self):
        """Write checkpoint.pt: all or nothing, and no weights that are not finite."""
        for thing in self.states.values():
            if isinstance(thing, torch.nn.Module):
                if not all(p.isfinite().all() for p in thing.parameters()):
                    raise FloatingPointError(f"a weight after update {self.step}")
        if rank() != 0:
            return
        saved = dict(method=self.c.method, config=self.config, data=self.about, source=self.c.data,
                     step=self.step, seconds=self.seconds, script=self.c.text,
                     threads=torch.get_num_threads() if own_threads(self.c) else 0)
        saved |= {name: thing.state_dict() for name, thing in self.states.items()}
        with inputs():
            save_tensors(self.path, saved)
