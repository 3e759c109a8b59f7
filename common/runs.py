"""What a run needs and no paper describes: flags, devices, random draws, the run's folder, checkpoints, EMA, several processes.

Only torch and the standard library are imported at the top, so that --help and wrong flags answer at once.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import json
import math
import operator
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

# ------------------------------------------------------------------------------------------------------------ flags


def option(default, help, use="train", low=None, high=None, above=None, choices=None, part=int, acts=False):
    """A field of a script's Config that is a flag too.

    use: the actions that read it, of "train sample evaluate"; given without one of these, the flag is an error.
    low, high: bounds that are allowed, above: one that is not; choices: the allowed words; part: of a tuple given as a,b,c, where
    Path means any number of files, a,b being one name; acts: given alone, such a flag asks for --sample.
    """
    return dataclasses.field(default=default, metadata={k: v for k, v in locals().items() if k != "default"})


@dataclasses.dataclass
class Shared:
    """The flags that all six scripts have, word for word."""
    data: str = option("digits", "digits, stacked, swirl, gaussians, mnist, fashion-mnist, cifar10, or the path of a folder or an "
                       "archive (.zip .tar .tar.gz .tar.xz) of pictures", "train sample evaluate")
    data_root: str = option("data", "where named data sets are kept and fetched to", "train sample evaluate")
    size: int = option(0, "resize pictures to this side; 0: the data's own", "train sample evaluate", low=0)
    classes: tuple = option((), "keep only these classes, e.g. airplane,bird", "train sample evaluate", part=str)
    run: str = option("", "folder of the run; default runs/<method>-<data>", "train sample evaluate")
    fresh: bool = option(False, "start over, whatever the folder holds")
    n: int = option(0, "how many samples; default 64, and 1000 for --evaluate", "sample evaluate", low=1)
    seed: int = option(0, "of every random number", "train sample evaluate", low=0, high=2 ** 63 - 1)
    out: str = option("", "where samples go: .png a grid, .gif the trajectory, .npz arrays, a folder one PNG each; "
                      "default samples.png in the run", "sample")
    checkpoint: str = option("", "sample from this file instead of the run's own", "sample evaluate")
    inception: str = option("", "the standard Inception network as a TorchScript file, for FID and IS", "evaluate")
    device: str = option("auto", "where to compute", "train sample evaluate", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "bf16 is automatic mixed precision; auto takes it where the hardware has it",
                            "train sample evaluate", choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the network: slow to start, faster to run", "train sample evaluate")


ACTIONS = dict(train="train the model, or finish training it", sample="draw samples", evaluate="judge samples against the data")
NAMED = ("digits", "stacked", "swirl", "gaussians", "mnist", "fashion-mnist", "cifar10")
POINTS = ("swirl", "gaussians")
FOR_PICTURES = {"size", "classes", "multipliers", "blocks", "attention", "heads", "resample", "flip", "inception", "encode", "interpolate"}
MAY_CHANGE = {"iters", "minutes", "device", "precision"}  # between the parts of one run


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(f"{message} (python {self.prog} --help lists the flags)")


def stop(message):
    """End the program with exit status 2 and one line on stderr."""
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def inputs():
    """Around whatever reads what the user gave (files, pictures, checkpoints): its ValueError or OSError ends with one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(error)


def _read(f):
    """The function that reads the text of flag f, with its bounds."""
    m, kind = f.metadata, type(f.default)

    def read(text):
        try:
            value = tuple(map(m["part"], filter(None, text.split(",")))) if kind is tuple else kind(text)
        except ValueError:
            what = {int: "a whole number", float: "a number", tuple: "whole numbers with commas, e.g. 1,2,2"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        for v in value if kind is tuple else (value,):
            if isinstance(v, float) and not math.isfinite(v):
                raise argparse.ArgumentTypeError(f"{text} is not a finite number")
            for bound, wrong, words in (("low", operator.lt, "small: at least"), ("above", operator.le, "small: more than"),
                                        ("high", operator.gt, "large: at most")):
                if m[bound] is not None and wrong(v, m[bound]):
                    raise argparse.ArgumentTypeError(f"{text} is too {words} {m[bound]}")
        return value
    return read


def parse(method, Config, recipes, doc):
    """Read the command line into one namespace: the actions, Config's fields and Shared's, with the recipe of the data set.

    method: the script's name, which runs and checkpoints bear; recipes: data set -> {field: value}, `pictures` stands for any path.
    A field's value is, in this order, the flag, the recipe, the default. Also set: method, given (the fields set by flags), name (of
    the data).
    Ends with exit status 2 and one line for whatever is wrong with a flag; without an action prints the help and ends.
    """
    fields = dataclasses.fields(Config) + dataclasses.fields(Shared)
    parser = _Parser(prog=f"{method}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    for action, text in ACTIONS.items():
        parser.add_argument(f"--{action}", action="store_true", help=text)
    groups = {}
    for f in fields:
        m = f.metadata
        title = {"train": "training", "sample": "sampling", "evaluate": "judging"}.get(m["use"], "sampling and judging")
        title = "everything" if m["use"] == "train sample evaluate" else title
        group = groups.setdefault(title, parser.add_argument_group(title))
        by_data = [f"{d} {_text(r[f.name])}" for d, r in recipes.items() if f.name in r]
        defaults = ([f"default {_text(f.default)}"] if f.default not in ("", 0, -1, (), False) else []) + by_data
        text = m["help"] + (f" ({'; '.join(defaults)})" if defaults else "")
        kind, more = type(f.default), dict(default=None, help=text.replace("%", "%%"))
        if m["part"] is Path:
            more |= dict(nargs="*", metavar="FILE")
        elif kind is bool:
            more |= dict(action=argparse.BooleanOptionalAction if by_data else "store_true")
        else:
            more |= dict(type=_read(f) if kind is not str else str, choices=m["choices"])
            more |= {} if m["choices"] else dict(metavar={int: "N", float: "X", tuple: "A,B", str: "TEXT"}[kind])
        group.add_argument(_flag(f.name), **more)
    c = parser.parse_args()
    c.given = {f.name for f in fields if getattr(c, f.name) is not None}
    c.sample = c.sample or any(f.metadata["acts"] and f.name in c.given for f in fields)
    actions = [a for a in ACTIONS if getattr(c, a)]
    if not actions:
        parser.print_help()
        raise SystemExit(0)
    for f in fields:
        if f.name in c.given and not set(f.metadata["use"].split()) & set(actions):
            stop(f"{_flag(f.name)} does nothing here: it belongs to " + " or ".join(f"--{u}" for u in f.metadata["use"].split()))
    c.data = "digits" if c.data is None else c.data
    if c.data not in NAMED and not Path(c.data).exists():
        stop(f"--data {c.data}: no such file or folder, and no data set of that name ({', '.join(NAMED)})")
    c.name = Path(c.data).resolve().name.split(".")[0]
    c.name = f"pictures-{c.name}" if c.name in NAMED and c.data not in NAMED else c.name
    for name in sorted(FOR_PICTURES & c.given if c.data in POINTS else ()):
        stop(f"--{name} is for pictures, and {c.data} has points: leave it out")
    if c.data in POINTS and c.out and not Path(c.out).suffix:
        stop(f"--out {c.out}: points go into a .png, .gif or .npz")
    recipe = dict(recipes.get(c.data if c.data in NAMED else "pictures", {}))
    if c.given & {"iters", "minutes"}:  # the user's end replaces the recipe's
        recipe = {k: v for k, v in recipe.items() if k not in ("iters", "minutes")}
    for f in fields:
        if getattr(c, f.name) is None:
            setattr(c, f.name, recipe.get(f.name, f.default))
    c.method = method
    c.train_fields = [f.name for f in dataclasses.fields(Config) if "train" in f.metadata["use"].split()] + ["seed"]
    c.run = Path(c.run or f"runs/{method}-{c.name}")
    if c.run.exists() and not c.run.is_dir():
        stop(f"--run {c.run} is a file: give a folder")
    if c.checkpoint and c.train:
        stop("--checkpoint is for sampling: a run goes on from its own checkpoint, so leave out one of --train and --checkpoint")
    if c.fresh and c.checkpoint:
        stop("--fresh and --checkpoint contradict each other: leave out one")
    if c.inception and not Path(c.inception).is_file():
        stop(f"--inception {c.inception}: no such file")
    if c.sample and c.n > 256 and c.out.endswith(".gif"):
        stop(f"--n {c.n}: a .gif shows at most 256 samples")
    if c.out:
        _writable(c.out)
    c.device = pick_device(c.device)
    c.precision = pick_precision(c.precision, c.device)
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))  # Run takes it over while it trains
    return c


def _flag(field):
    return "--" + field.replace("_", "-")


def _text(value):
    return ",".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else str(value)


def _writable(path):
    """Say now, not after an hour, that --out cannot be written."""
    p = Path(path)
    if p.suffix not in (".png", ".gif", ".npz", ""):
        stop(f"--out {path}: unknown ending {p.suffix}, use .png, .gif, .npz or a folder")
    parent = next(a for a in [p if p.suffix == "" else p.parent, *p.parents] if a.exists())
    if (p.suffix == "" and p.exists() and not p.is_dir()) or (p.suffix and p.is_dir()):
        stop(f"--out {path}: there is a {'folder' if p.suffix else 'file'} of that name")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        stop(f"--out {path}: {parent} cannot be written to")


def pick_device(name):
    """A torch.device for auto, cpu, cuda or mps; under torchrun each process takes its own GPU. Ends the program if it is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(d for d in there if there[d])
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count() > 0:
        stop(f"there are {torch.cuda.device_count()} GPUs here: start no more processes than that on a machine, or give --device cpu")
    if not there[name]:
        stop(f"--device {name}: there is none here that PyTorch can use; leave the flag out, or give --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_precision(name, device):
    """fp32 or bf16: for auto, bf16 on GPUs that have it and on processors with matrix units (AMX), elsewhere fp32, which is
    faster there: AVX-512's bf16 reached half of fp32's rate in convolutions."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() else "fp32"


def autocast(c):
    """The context for a forward pass: bf16 mixed precision where c.precision says so.

    A network that predicts the mean stays in fp32: x_{t-1} and x_t differ by less than bf16 resolves.
    """
    return torch.autocast(c.device.type, torch.bfloat16, enabled=c.precision == "bf16" and getattr(c, "predict", "") != "mean")


# ----------------------------------------------------------------------------------------------------- random draws
# A random number is a function of (seed, stream, step, sample, element). Training and sampling never share a stream.
(ORDER, FLIP, TIME, NOISE, DROP, START, STEP, JUDGE) = range(8)


def generator(seed, stream, step=0):
    """A CPU generator that depends on these three numbers alone, for all draws that are not normal."""
    import numpy as np
    state = np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


@functools.lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def batch_index(n, batch, seed, step):
    """Which of n pictures the whole batch of update `step` (1, 2, ...) holds: every epoch visits each once. int64 (batch,)."""
    place = torch.arange((step - 1) * batch, step * batch)
    first, last = int(place[0]) // n, int(place[-1]) // n
    return torch.cat([_order(n, seed, e)[place[place // n == e] - e * n] for e in range(first, last + 1)])


def rows(batch):
    """The slice of a whole batch that this process computes."""
    return slice(rank() * (batch // world()), (rank() + 1) * (batch // world()))


def training_batch(data, c, step, flip=False):
    """This process's part of update `step`'s batch: x0 in [-1, 1], (b, C, H, W) or (b, 2), and labels (b,), on c.device."""
    part = rows(c.batch)
    mirrored = torch.rand(c.batch, generator=generator(c.seed, FLIP, step))[part] < 0.5 if flip else None
    return data.batch(batch_index(len(data), c.batch, c.seed, step)[part], c.device, mirrored)


def spread(c, step):
    """This process's part of one u in [0, 1) for each sample of update `step`'s batch, float64 (b,), on the CPU.

    One in each of `batch` equal parts, all shifted by the same random part: every u is as likely as any other, and a batch's mean
    varies less than with independent draws (Kingma 2021, appendix I.1).
    """
    shift = torch.rand((), generator=generator(c.seed, TIME, step), dtype=torch.float64)
    return ((torch.arange(c.batch) + shift) / c.batch)[rows(c.batch)]


def count_labels(c, classes):
    """How many labels the network learns: all of the data's classes with --conditional, otherwise none."""
    if c.conditional and len(classes) < 2:
        stop(f"--conditional needs data with at least two classes; {c.data} has {len(classes)}")
    return len(classes) if c.conditional else 0


def drop_labels(label, c, step):
    """Labels (b,) of which a tenth, drawn for update `step`, become c.labels: "no label" (Ho 2022, classifier-free guidance)."""
    dropped = torch.rand(c.batch, generator=generator(c.seed, DROP, step))[rows(c.batch)] < 0.1
    return torch.where(dropped.to(label.device) | (label < 0), c.labels, label)  # -1: a picture without a class


def sample_labels(c, n, label=-1):
    """Labels (n,) on c.device for conditional models: this one, or (-1) each class in turn; None for others."""
    if not c.labels:
        return None
    if label >= c.labels:
        stop(f"--label {label}: this model has labels 0 to {c.labels - 1}")
    return torch.full((n,), label, device=c.device) if label >= 0 else torch.arange(n, device=c.device) % c.labels


# ------------------------------------------------------------------------------------------------ several processes


def rank():
    """This process's number among torchrun's; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(c):
    """Meet the other processes of torchrun; nothing to do without it."""
    if world() > 1:
        if c.batch % world():
            stop(f"--batch {c.batch} cannot be split evenly among {world()} processes")
        if c.device.type == "cuda":
            torch.cuda.set_device(c.device)
        dist.init_process_group("nccl" if c.device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))  # rank 0 may have much to fetch


def leave():
    """Part from the other processes when training is over; what follows is rank 0's alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def average_gradients(parameters):
    """One all-reduce that turns each process's gradients into their mean. After backward, so any kind of backward will do."""
    if world() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= world()
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


# -------------------------------------------------------------------------------------------------------------- EMA


class EMA:
    """The running mean of a network's parameters: decay rises as (1 + n) / (10 + n) to `decay`, so early samples are not noise."""

    def __init__(self, net, decay):
        self.net, self.decay, self.updates = copy.deepcopy(net).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, net):
        """After each update of net."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)

    def state_dict(self):
        """For the checkpoint: the mean and how many updates it has seen."""
        return dict(net=self.net.state_dict(), updates=self.updates)

    def load_state_dict(self, state):
        """Go on from a checkpoint."""
        self.net.load_state_dict(state["net"])
        self.updates = state["updates"]


# ------------------------------------------------------------------------------------------- checkpoints and folders


@contextlib.contextmanager
def written(path):
    """A temporary path beside `path` that takes its name, flushed to disk, when all went well, and vanishes when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, methods):
    """The dict that Run.save wrote: method, config, data, step, seconds, and the states. Executes nothing from the file.

    methods: the names of the scripts whose checkpoints will do. ValueError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there: train first (--train), or give --checkpoint FILE")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        method, *_ = saved["method"], dict(saved["config"]), saved["data"]["shape"][-1], saved["data"]["classes"], saved["step"] + 1
    except Exception:  # a damaged or foreign file raises anything
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged") from None
    if method not in methods:
        raise ValueError(f"{path} is a checkpoint of {method}.py, which {methods[0]}.py cannot use")
    return saved


def load_states(saved, path, **objects):
    """Give each object the state of its name from a checkpoint. ValueError if one does not fit."""
    try:
        for name, thing in objects.items():
            thing.load_state_dict(saved[name])
    except Exception:
        raise ValueError(f"{path} is damaged, or does not fit this version of the network") from None


def trained(c, methods=None):
    """The checkpoint to sample from, after checking it against the flags: --checkpoint, or the run's own.

    Returns the dict and c with every training setting replaced by the checkpoint's. Ends the program with one line where the file
    is missing, damaged, or of another method or other data.
    """
    path = Path(c.checkpoint) if c.checkpoint else c.run / "checkpoint.pt"
    with inputs():
        saved = load_checkpoint(path, methods or (c.method,))
        shape, classes = saved["data"]["shape"], saved["data"]["classes"]
        for flag, value, there in (("data", c.name, saved["data"]["data"]), ("size", c.size, shape[-1]),
                                   ("classes", _text(sorted(c.classes)), _text(sorted(classes)))):
            if flag in c.given and value != there:
                raise ValueError(f"{path} was trained with --{flag} {there}, not {value}: change the flag, or give another --run "
                                 "or --checkpoint")
        was, c = c, SimpleNamespace(**vars(c))
        for name in {*c.train_fields, "variance"} & set(saved["config"]) - {"seed"}:  # nothing else in the file is believed
            value = saved["config"][name]
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, type(getattr(was, name, ""))):
                raise ValueError(f"{path} is damaged: {name} = {value!r}")
            setattr(c, name, value)
    c.data = c.data if "data" in c.given else saved["source"]
    c.size, c.classes = shape[-1] if len(shape) == 3 else 0, tuple(classes)
    c.name, c.checkpoint = saved["data"]["data"], str(path)
    return saved, c


def load_data(c, split="train"):
    """The data set that the flags name; ends the program with one line where it cannot be had."""
    from common.data import load
    for turn in (0, 1):  # rank 0 fetches and caches first
        if turn == min(rank(), 1):
            with inputs():
                data = load(c.data, c.data_root, c.size or None, c.classes or None, split)
        if dist.is_initialized():
            dist.barrier()
    return data


# ---------------------------------------------------------------------------------------------------------- the run
LOG_EVERY = 10  # updates averaged in a row of metrics.csv
SAVE_EVERY = 60.0  # seconds


class Run:
    """A training run in its folder. `for step in run:` counts updates, from where the checkpoint ended to the last one.

    c: from parse, with iters and minutes; data: the Dataset; states: what a checkpoint holds beside the step, each with state_dict and
    load_state_dict. Inside the loop call run.log(loss=..., ...) once per update with scalar tensors. The loop ends at c.iters updates,
    after c.minutes of training in all, or at Ctrl-C or SIGTERM (then with a checkpoint and exit status 130). A value that is not
    finite ends it too, naming the update, and the last good checkpoint stays.
    """

    def __init__(self, c, data, **states):
        self.c, self.states = c, states
        self.path = c.run / "checkpoint.pt"
        self.config = {name: getattr(c, name) for name in c.train_fields}
        self.data = dict(data=c.name, shape=list(data.shape), classes=list(data.classes), pictures=len(data))
        self.step, self.seconds, self.window, self.bar, self.interrupted = 0, 0.0, [], None, False
        if c.fresh and rank() == 0:
            self.path.unlink(missing_ok=True)
            (c.run / "metrics.csv").unlink(missing_ok=True)
        if world() > 1:
            dist.barrier()
        if self.path.exists():
            self._resume()
        if self._agree(self.step, -self.step) != [self.step, -self.step]:
            stop(f"the processes found different checkpoints in {c.run}: it must lie on a disk that all of them share")
        if rank() == 0:
            with inputs():
                c.run.mkdir(parents=True, exist_ok=True)
                self._cut_metrics()
                import numpy
                versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=numpy.__version__)
                settings = {k: str(v) if isinstance(v, (Path, torch.device)) else v for k, v in vars(c).items()
                            if k not in ("given", "train_fields")}
                with written(c.run / "config.json") as file:
                    file.write_text(json.dumps(dict(settings, data_shape=data.shape, versions=versions, processes=world(),
                                                    command=" ".join(sys.argv)), indent=2, default=str) + "\n")

    def _resume(self):
        with inputs():
            saved = load_checkpoint(self.path, (self.c.method,))
            was = dict(saved["config"], **saved["data"])
            for name, now in {**self.config, **self.data}.items():
                if name not in MAY_CHANGE and _text(now) != _text(was.get(name)):
                    raise ValueError(f"{self.c.run} was trained with {name} = {_text(was.get(name))}, not {_text(now)}: use the same "
                                     "flags, another --run, or --fresh to start over")
            load_states(saved, self.path, **self.states)
        self.step, self.seconds = saved["step"], saved["seconds"]

    def _cut_metrics(self):
        """Drop the rows that a killed run wrote after its last checkpoint: they will be computed again."""
        path = self.c.run / "metrics.csv"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            with written(path) as file:
                file.write_text("".join(lines[:1] + [line for line in lines[1:] if line.endswith("\n")
                                                     and int(line.split(",")[0]) <= self.step]))

    def _finished(self):
        return self.step >= self.c.iters or bool(self.c.minutes) and self.seconds >= 60 * self.c.minutes

    def __iter__(self):
        from tqdm import tqdm
        if self._finished():
            return
        old = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        start, before, saved_at = time.monotonic(), self.seconds, time.monotonic()
        self.bar = tqdm(total=self.c.iters, initial=self.step, disable=rank() != 0, mininterval=0.2 if sys.stderr.isatty() else 10,
                        desc=str(self.c.run), bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}")
        first = self.step
        try:
            while True:
                self.step += 1
                yield self.step
                self.seconds = before + time.monotonic() - start
                if self.step % LOG_EVERY == 0:
                    rate = (self.step - first) / max(self.seconds - before, 1e-9)
                    left = (self.c.iters - self.step) / rate
                    left = min(left, 60 * self.c.minutes - self.seconds) if self.c.minutes else left
                    self.bar.set_postfix_str(f"{self._flush()}, {rate * self.c.batch:.0f} images/s, {tqdm.format_interval(max(0, left))} left", refresh=False)
                self.bar.update()
                last = self.step >= self.c.iters
                done, interrupted = self._agree(self._finished(), self.interrupted) if self.step % LOG_EVERY == 0 or last or \
                    world() == 1 else (False, False)  # every process stops at the same update: what one wants, all do
                if done or interrupted or self.step % LOG_EVERY == 0 and time.monotonic() - saved_at > SAVE_EVERY:
                    self._flush()
                    self.save()
                    saved_at = time.monotonic()
                if interrupted:
                    if rank() == 0:
                        self.bar.close()
                        print(f"interrupted at update {self.step}; the same command goes on from there", file=sys.stderr)
                    raise SystemExit(130)
                if done:
                    return
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def _interrupt(self, number, frame):
        if self.interrupted and number == signal.SIGINT:  # a second Ctrl-C does not wait for the update to end
            raise SystemExit(130)
        self.interrupted = True

    def _agree(self, *numbers):
        """The largest of each number among the processes."""
        if world() == 1:
            return list(numbers)
        largest = torch.tensor([int(n) for n in numbers], device=self.c.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def log(self, **values):
        """One update's scalars (detached 0-d tensors or floats); averaged over LOG_EVERY updates into a row of metrics.csv."""
        self.window.append({k: torch.as_tensor(v).detach().float() for k, v in values.items()})

    def _flush(self):
        """Write the row of the updates since the last one; stop if any value in it is not finite. Returns it as text."""
        if not self.window:
            return ""
        names = list(self.window[0])
        table = torch.stack([torch.stack([row[n].to(self.c.device) for n in names]) for row in self.window])
        if world() > 1:
            dist.all_reduce(table)
            table /= world()
        table = table.cpu().double()
        if not table.isfinite().all():
            bad = int((~table.isfinite()).any(1).nonzero()[0])
            self._not_finite(f"the loss of update {self.step - len(self.window) + 1 + bad}")
        means = table.mean(0).tolist()
        if rank() == 0:
            path = self.c.run / "metrics.csv"
            new = not path.exists()
            with inputs(), open(path, "a", newline="") as file:
                rows = csv.writer(file)
                if new:
                    rows.writerow(["step", "seconds", *names])
                rows.writerow([self.step, f"{self.seconds:.2f}", *[f"{m:.9g}" for m in means]])
        self.window = []
        return ", ".join(f"{n} {m:.4f}" for n, m in zip(names, means))

    def _not_finite(self, what):
        self.bar.close()
        kept = f"; {self.path} holds the last good state" if self.path.exists() else ""
        stop(f"{what} is not finite{kept}. A smaller --lr usually helps, or --precision fp32")

    def save(self):
        """Write checkpoint.pt: all or nothing, and no weights that are not finite."""
        for thing in self.states.values():
            if isinstance(thing, torch.nn.Module) and not all(p.isfinite().all() for p in thing.parameters()):
                self._not_finite(f"a weight after update {self.step}")
        if rank() == 0:
            with inputs(), written(self.path) as file:
                try:
                    torch.save(dict(method=self.c.method, config=self.config, data=self.data, source=self.c.data, step=self.step,
                                    seconds=self.seconds, **{k: v.state_dict() for k, v in self.states.items()}), file)
                except RuntimeError as fault:  # PyTorch's word for a full disk
                    raise OSError(f"{self.path} cannot be written: {fault}") from None


def finish(c, trained):
    """After --train: loss.png, a word if nothing was left to train, and --sample where a run would be left without a sheet."""
    if rank() == 0:
        from common import pictures
        pictures.curves(c.run)
        if not trained:
            print(f"{c.run} is already trained: give more --iters or --minutes, or --fresh to start over")
        c.sample = c.sample or trained or not (c.run / "samples.png").exists()


# ---------------------------------------------------------------------------------------------- sampling and judging


def progress(steps, what):
    """tqdm over a sequence, gone when it ends."""
    from tqdm import tqdm
    return tqdm(steps, desc=what, leave=False, disable=rank() != 0 or not sys.stderr.isatty())


class Stopwatch:
    """`for first, size in watch.batches(n):` counts off n samples and times each batch, the accelerator's queue emptied."""

    def __init__(self, device):
        self.device, self.laps = device, []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def batches(self, n, size=256):
        """(first, how many) of each batch; what the loop's body does with it is timed."""
        for first in range(0, n, size):
            start, many = self._now(), min(size, n - first)
            yield first, many
            self.laps.append((many, self._now() - start))

    def ms(self):
        """Milliseconds per image: the median of the batches after the first, which warms up (of the first if it is alone)."""
        return statistics.median(1000 * s / n for n, s in self.laps[1:] or self.laps)

    def report(self, evaluations, path):
        """The line that ends sampling."""
        n, s = (sum(column) for column in zip(*self.laps))
        return f"{n} samples in {s:.1f} s, {evaluations} network evaluations each, {1000 * s / n:.1f} ms per sample: {path}"
