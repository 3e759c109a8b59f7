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
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ACTIONS = dict(train="train the model, or finish training it", sample="draw samples", evaluate="judge samples against the data")
ALL = " ".join(ACTIONS)
KINDS = {int: ("N", "a whole number"), float: ("X", "a number"), tuple: ("A,B", "whole numbers, e.g. 1,2"), str: ("TEXT", "text")}
NAMED = ("digits", "stacked", "swirl", "gaussians", "mnist", "fashion-mnist", "cifar10")
POINTS = ("swirl", "gaussians")
FOR_PICTURES = set("size classes multipliers blocks attention heads resample flip inception encode interpolate".split())


# ------------------------------------------------------------------------------------------------------------ flags
def option(default, help, use="train", low=None, high=None, above=None, choices=None, part=int, acts=False,
           needs=""):
    """A field of a script's Config that is a flag too.

    use: the actions that read it; given without one of these, it is an error. low, high: bounds that are allowed; above: one that
    is not. part: of a tuple given as a,b,c; Path: any number of files. acts: given alone, such a flag asks for --sample.
    needs: the training flags without which it has no effect, for `idle`.
    """
    return dataclasses.field(default=default, metadata=locals())


@dataclasses.dataclass
class Shared:
    """The flags that all six scripts have, word for word."""
    data: str = option("digits", f"{', '.join(NAMED)}, or a folder or archive (.zip .tar .tar.gz .tar.xz) of pictures", ALL)
    data_root: str = option("data", "where named data sets are kept and fetched to", ALL)
    size: int = option(0, "resize pictures to this side; 0: the data's own", ALL, low=0)
    classes: tuple = option((), "keep only these classes, e.g. airplane,bird", ALL, part=str)
    run: str = option("", "folder of the run; default runs/<method>-<data>", ALL)
    fresh: bool = option(False, "start over, whatever the folder holds")
    n: int = option(0, "how many samples; default 64 pictures or 1000 points, and 1000 for --evaluate", "sample evaluate", low=1)
    seed: int = option(0, "of every random number", ALL, low=0, high=2 ** 63 - 1)
    out: str = option("", ".png a grid, .gif the trajectory, .npz, or a folder of PNGs; default samples.png in the run", "sample")
    checkpoint: str = option("", "sample from this file instead of the run's own", "sample evaluate")
    inception: str = option("", "the standard Inception network as a TorchScript file, for FID and IS", "evaluate")
    device: str = option("auto", "where to compute", ALL, choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "bf16: mixed; auto: bf16 where the hardware has it", ALL, choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the networks: slow to start, faster to run", ALL)


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


def _text(value):
    return ",".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else str(value)


def _read(f, text):
    m, kind = f.metadata, type(f.default)
    try:
        values = tuple(map(m["part"], filter(None, text.split(",")))) if kind is tuple else (kind(text),)
    except ValueError:
        wanted = "numbers, e.g. 0.5,1" if m["part"] is float else KINDS[kind][1]
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if wrong := _unfit(m, values):
        raise argparse.ArgumentTypeError(f"{text} is not {wrong}")
    return values if kind is tuple else values[0]


def _unfit(m, values):
    """The bound of a flag's metadata that one of the values breaks, in words; None if they fit."""
    for v in values:
        for fits, words in ((not isinstance(v, float) or math.isfinite(v), "finite"),
                            (m["low"] is None or v >= m["low"], f"at least {m['low']}"),
                            (m["above"] is None or v > m["above"], f"more than {m['above']}"),
                            (m["high"] is None or v <= m["high"], f"at most {m['high']}"),
                            (m["choices"] is None or v in m["choices"], f"of {m['choices']}")):
            if not fits:
                return words
    return None


def parse(method, Config, recipes, doc):
    """The command line as one namespace: the actions, and Config's and Shared's fields from the flag, the recipe or the default.

    method: the script's name, which runs and checkpoints bear; recipes: data set or name of a folder -> {field: value}, `pictures` is
    any other path. Also set: method, given (the fields set by flags), sheet (samples to draw; 0: as trained() finds fit), name (of the
    data), train_fields (what belongs to a trained model).
    Ends with exit status 2 and one line for whatever is wrong with a flag; without an action prints the help and ends.
    """
    fields = {f.name: f for part in (Config, Shared) for f in dataclasses.fields(part)}
    flags = {name: "--" + name.replace("_", "-") for name in fields}
    uses = {name: f.metadata["use"] for name, f in fields.items()}
    parser = argparse.ArgumentParser(f"{method}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: stop(f"{message} (python {method}.py --help lists the flags)")
    for action, text in ACTIONS.items():
        parser.add_argument(f"--{action}", action="store_true", help=text)
    groups = {use: parser.add_argument_group("for --" + use.replace(" ", ", --")) for use in dict.fromkeys(uses.values())}
    for name, f in fields.items():
        m, kind = f.metadata, type(f.default)
        defaults = [] if f.default in ("", 0, -1, (), False) else [f"default {_text(f.default)}"]
        defaults += [f"{data} {_text(recipe[name])}" for data, recipe in recipes.items() if name in recipe]
        if m["part"] is Path:
            more = dict(nargs="*", metavar="FILE")
        elif kind is bool:
            more = dict(action=argparse.BooleanOptionalAction if defaults else "store_true")
        else:
            more = dict(type=functools.partial(_read, f), choices=m["choices"], metavar=None if m["choices"] else KINDS[kind][0])
        text = m["help"] + (f" ({'; '.join(defaults)})" if defaults else "")
        groups[uses[name]].add_argument(flags[name], help=text.replace("%", "%%"), **more)

    flagged = vars(parser.parse_args())
    c = argparse.Namespace(**dict.fromkeys(ACTIONS, False) | {name: f.default for name, f in fields.items()} | flagged)
    c.method, c.given, c.sheet = method, fields.keys() & flagged, c.n
    c.sample = c.sample or any(fields[name].metadata["acts"] for name in c.given)
    actions = [action for action in ACTIONS if getattr(c, action)]
    if not actions:
        parser.print_help()
        parser.exit()
    ends = {"iters", "minutes"}  # the user's replace both of the recipe's
    kept = c.given | ends if c.given & ends else c.given
    c.train_fields = {f.name: f.metadata for f in dataclasses.fields(Config) if "train" in uses[f.name]} | {"seed": fields["seed"].metadata}
    c.name = Path(c.data).resolve().name.split(".")[0]  # a folder may have a recipe of its own, by its name
    own = c.name.lower().replace("_", "-")
    recipe = recipes.get(c.data if c.data in NAMED else own if own in recipes.keys() - {*NAMED} else "pictures", {})
    c.name = f"pictures-{c.name}" if c.name in NAMED and c.data not in NAMED else c.name
    vars(c).update({name: type(fields[name].default)(value) for name, value in recipe.items() if name not in kept})  # 14 is 14.0 too
    c.run = Path(c.run or f"runs/{method}-{c.name}")

    for name in sorted(c.given):
        if not any(action in uses[name] for action in actions):
            stop(f"{flags[name]} does nothing here: it belongs to --{uses[name].replace(' ', ' or --')}")
    unfit = next((f"--{name}" for name in sorted(FOR_PICTURES & c.given) if c.data in POINTS), None)
    out = Path(c.out)
    folder = next(a for a in (out.parent if out.suffix else out, *out.parents) if os.path.exists(a))
    for wrong, message in (
            (c.data not in NAMED and not os.path.exists(c.data),
             f"--data {c.data}: no such file or folder, and no data set of that name ({', '.join(NAMED)})"),
            (unfit, f"{unfit} is for pictures, and {c.data} has points: leave it out"),
            (os.path.isfile(c.run), f"--run {c.run} is a file: give a folder"),
            (c.checkpoint and c.train, "--checkpoint is for sampling, and --train goes on from its run's own: leave out one"),
            (c.inception and not os.path.isfile(c.inception), f"--inception {c.inception}: no such file"),
            (out.suffix not in (".png", ".gif", ".npz", ""), f"--out {out}: unknown ending, use .png, .gif, .npz or a folder"),
            (c.out and c.data in POINTS and not out.suffix, f"--out {out}: points go into a .png, .gif or .npz"),
            (c.n > 256 and out.suffix == ".gif", f"--n {c.n}: a .gif shows at most 256 samples"),
            (c.out and (out.suffix and os.path.isdir(out) or not folder.is_dir() or not os.access(folder, os.W_OK)),
             f"--out {out} cannot be written: there is a folder of that name, or {folder} is not a folder to write in")):
        if wrong:
            stop(message)
    _place(c)
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))  # Run takes it over while it trains
    return c


def _place(c):
    """Set c.device, under torchrun a GPU for each process, and c.precision.

    auto is bf16 on GPUs that have it and on processors with matrix units (AMX), elsewhere fp32, which is faster there: AVX-512's
    bf16 reached half of fp32's rate in convolutions.
    """
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d in there if there[d]) if c.device == "auto" else c.device
    if not there[name] or name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        stop(f"--device {name}: PyTorch finds none here, or fewer than there are processes; start fewer, or give --device cpu")
    c.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if c.precision == "auto":
        has_bf16 = dict(cuda=torch.cuda.is_bf16_supported, cpu=getattr(torch.cpu, "_is_amx_tile_supported", bool))
        c.precision = "bf16" if has_bf16.get(name, bool)() else "fp32"
    _resolve(c)


def _resolve(c):
    """Set c.precision to fp32 where bf16 does not resolve what counts: x_{t-1}, for a network that predicts its mean, differs little
    from x_t, and a mode of points is 0.01 wide."""
    if c.precision == "bf16" and (getattr(c, "predict", "") == "mean" or c.name in POINTS):
        if "precision" in c.given:
            stop(f"--precision bf16 is too coarse for {'points' if c.name in POINTS else '--predict mean'}: leave it out")
        c.precision = "fp32"


def idle(c):
    """Raise ValueError for a training flag that was given and does nothing, because one that it needs is off: empty, or its least."""
    for name in sorted(c.given & c.train_fields.keys()):
        for need in c.train_fields[name]["needs"].split():
            value = getattr(c, need)
            if value == () or value == c.train_fields[need]["low"]:
                flag, need = (f"--{n.replace('_', '-')}" for n in (name, need))
                raise ValueError(f"{flag} does nothing with {need} {_text(value)}: leave it out")


def autocast(c):
    """The context for a forward pass: bf16 mixed precision where c.precision says so."""
    return torch.autocast(c.device.type, torch.bfloat16, enabled=c.precision == "bf16")


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
    return torch.cat([_order(n, seed, e)[place[place // n == e] - e * n] for e in (place // n).unique().tolist()])


def rows(batch):
    """The slice of a whole batch that this process computes."""
    return slice(rank() * (batch // world()), (rank() + 1) * (batch // world()))


def training_batch(data, c, step, flip=False):
    """This process's part of update `step`'s batch: x0 in [-1, 1], (b, C, H, W) or (b, 2), and labels (b,), on c.device."""
    part = rows(c.batch)
    mirrored = torch.rand(c.batch, generator=generator(c.seed, FLIP, step))[part] < 0.5 if flip else None
    return data.batch(batch_index(len(data), c.batch, c.seed, step)[part], c.device, mirrored)


def spread(c, step, part=None, alike=1):
    """One u in [0, 1) for each sample of update `step`'s batch, or of its part, by default this process's: float64, on the CPU.

    One in each of `batch` equal parts, all shifted alike: a batch's mean varies less (Kingma 2021, appendix I.1). Of as many
    consecutive samples as `alike` says, all have the same u.
    """
    shift = torch.rand((), generator=generator(c.seed, TIME, step), dtype=torch.float64)
    u = (torch.arange(c.batch // alike) + shift) / (c.batch // alike)
    return u.repeat_interleave(alike)[rows(c.batch) if part is None else part]


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
        backend = "nccl" if c.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))  # rank 0 may have much to fetch


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
        for g, mean in zip(gradients, (flat / world()).split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))


# -------------------------------------------------------------------------------------------------------------- EMA
class EMA:
    """The running mean of a network's parameters: decay rises as (1 + n) / (10 + n) to `decay`, lest early samples be noise."""

    def __init__(self, net, decay):
        self.net, self.decay, self.updates = copy.deepcopy(net).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, net):
        """After each update of net."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)

    def state_dict(self):
        return dict(net=self.net.state_dict(), updates=self.updates)

    def load_state_dict(self, state):
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
    except OSError as fault:
        raise OSError(f"{path} cannot be written: {fault}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, methods, **settings):
    """The dict that Run.save wrote; executes nothing from the file. ValueError for one of another method or other settings."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        method, data, _ = saved["method"], saved["data"], saved["step"] + 1
        if len(data["shape"]) not in (1, 3) or not all(isinstance(n, int) and n > 0 for n in data["shape"]):
            raise ValueError("shape")
        known = saved["config"] | data | dict(size=data["shape"][-1], classes=sorted(data["classes"]))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: train first (--train), or give --checkpoint FILE") from None
    except Exception:  # a damaged or foreign file raises anything
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged") from None
    if method not in methods:
        raise ValueError(f"{path} is a checkpoint of {method}.py, which {methods[0]}.py cannot use")
    for name, now in settings.items():
        now, was = _text(now), _text(known.get(name))
        if now != was:
            same = f"--{name} {was}" if name in ("data", "size", "classes") else "the same flags"
            raise ValueError(f"{path} was trained with {name} = {was}, not {now}: give {same}, another --run or --checkpoint, or "
                             "train with --fresh to start over")
    return saved


def load_states(saved, path, **objects):
    """Give each object the state of its name from a checkpoint. ValueError if one does not fit."""
    try:
        for name, thing in objects.items():
            thing.load_state_dict(saved[name])
    except Exception:
        raise ValueError(f"{path} is damaged, or does not fit this version of the network") from None


def trained(c, methods=None):
    """The checkpoint to sample from, --checkpoint or the run's own, and c with the checkpoint's training settings."""
    c = copy.copy(c)
    c.checkpoint = c.checkpoint or str(c.run / "checkpoint.pt")
    with inputs():
        flags = dict(data=c.name, size=c.size, classes=sorted(c.classes))
        saved = load_checkpoint(c.checkpoint, methods or (c.method,), **{k: v for k, v in flags.items() if k in c.given})
        for key in {*c.train_fields, "variance"} & set(saved["config"]) - {"seed"}:  # nothing else in the file is believed
            value = saved["config"][key]
            value = tuple(value) if isinstance(value, list) else value
            fits = isinstance(value, type(getattr(c, key, "")))
            if saved["method"] == c.method and key in c.train_fields:  # another script may have more choices
                fits = fits and not _unfit(c.train_fields[key], value if isinstance(value, tuple) else (value,))
            if not fits:
                raise ValueError(f"{c.checkpoint} is damaged: {key} = {value!r}")
            setattr(c, key, value)
    c.data = c.data if "data" in c.given else saved["source"]
    shape, c.name, c.classes = saved["data"]["shape"], saved["data"]["data"], tuple(saved["data"]["classes"])
    c.size = shape[-1] if len(shape) == 3 else 0
    _resolve(c)
    c.sheet = c.sheet or (64 if len(shape) == 3 or c.out.endswith(".gif") else 1000)  # few points show no shape
    return saved, c


def load_data(c, split="train"):
    """The data set that the flags name; ends the program with one line where it cannot be had."""
    from common.data import load
    if dist.is_initialized() and rank() > 0:  # rank 0 fetches and caches first
        dist.barrier()
    with inputs():
        data = load(c.data, c.data_root, c.size or None, c.classes or None, split)
    if dist.is_initialized() and rank() == 0:
        dist.barrier()
    return data


# ---------------------------------------------------------------------------------------------------------- the run
LOG_EVERY = 10  # updates averaged in a row of metrics.csv
SAVE_EVERY = 60.0  # seconds


class Run:
    """A training run in its folder. `for step in run:` counts updates, from where the checkpoint ended to the last one.

    c: from parse, with iters and minutes; data: the Dataset; states: what a checkpoint holds beside the step, with state_dict and
    load_state_dict. Inside the loop call run.log(loss=...) once per update with scalar tensors. The loop ends at c.iters updates,
    after c.minutes of training in all, or at Ctrl-C or SIGTERM (then with a checkpoint and exit status 130). A value that is not
    finite ends it too, naming the update, and the last good checkpoint stays.
    """

    def __init__(self, c, data, **states):
        self.c, self.states, self.path, self.table = c, states, c.run / "checkpoint.pt", c.run / "metrics.csv"
        self.config = {name: getattr(c, name) for name in c.train_fields}
        self.data = dict(data=c.name, shape=list(data.shape), classes=list(data.classes), pictures=len(data))
        self.step, self.seconds, self.limit, self.window, self.interrupted = 0, 0.0, 60 * c.minutes or math.inf, [], False
        self.last = {}
        with inputs():
            if self.path.exists() and not c.fresh:
                fixed = {name: value for name, value in self.config.items() if name not in ("iters", "minutes")}
                saved = load_checkpoint(self.path, (c.method,), **fixed | self.data | dict(classes=sorted(data.classes)))
                load_states(saved, self.path, **states)
                self.step, self.seconds = saved["step"], saved["seconds"]
            self.began = self.step
            if self._agree(self.step, -self.step) != [self.step, -self.step]:
                raise ValueError(f"the processes found different checkpoints in {c.run}: give a folder that all of them share")
            if rank() == 0:
                self._begin()

    def _begin(self):
        """Write config.json, and drop what a killed run logged after its last checkpoint: it will be computed again."""
        import numpy
        settings = {name: value for name, value in vars(self.c).items() if name not in ("given", "sheet", "train_fields")}
        versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=numpy.__version__)
        settings |= dict(data_shape=self.data["shape"], versions=versions, processes=world(), command=" ".join(sys.argv))
        with written(self.c.run / "config.json") as file:
            file.write_text(json.dumps(settings, indent=2, default=str) + "\n")
        if self.step == 0:
            self.path.unlink(missing_ok=True)
            self.table.unlink(missing_ok=True)
        elif self.table.exists():
            head, *rows = self.table.read_bytes().splitlines(keepends=True) or [b""]
            with written(self.table) as file:
                file.write_bytes(head + b"".join(r for r in rows if r.endswith(b"\n") and int(r.split(b",")[0]) <= self.step))

    def _finished(self):
        return self.step >= self.c.iters or self.seconds >= self.limit

    def __iter__(self):
        if self._finished():
            return
        from tqdm import tqdm
        handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        first, before, saved_at, start = self.step, self.seconds, self.seconds, time.monotonic() - self.seconds
        done = interrupted = False
        bar = tqdm(desc=str(self.c.run), total=self.c.iters, initial=self.step, disable=rank() != 0,
                   mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True,
                   bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}")
        lines = [bar]  # on a terminal two, where one is too short for all the numbers
        try:
            while not (done or interrupted):
                self.step += 1
                yield self.step
                self.seconds = time.monotonic() - start
                logs = self.step % LOG_EVERY == 0
                if logs:
                    rate = (self.step - first) / max(self.seconds - before, 1e-9)
                    left = tqdm.format_interval(max(0, min((self.c.iters - self.step) / rate, self.limit - self.seconds)))
                    where, numbers = f"{left} left, {rate * self.c.batch:.0f} images/s", self._flush()
                    if len(numbers) > 40 and sys.stderr.isatty() and not bar.disable:
                        if len(lines) == 1:
                            lines.append(tqdm(bar_format="{desc}", position=1, dynamic_ncols=True))
                        lines[1].set_description_str(numbers)
                        numbers = ""
                    bar.set_postfix_str(f"{where}, {numbers}".removesuffix(", "), refresh=False)
                bar.update()
                if logs or self.step >= self.c.iters or world() == 1:  # several processes stop at the same update
                    done, interrupted = self._agree(self._finished(), self.interrupted)
                if done or interrupted or logs and self.seconds - saved_at > SAVE_EVERY:
                    self._flush()
                    self.save()
                    saved_at = self.seconds
        except FloatingPointError as what:
            for line in lines:
                line.close()
            kept = f"; {self.path} holds the last good state" if self.path.exists() else ""
            stop(f"{what} is not finite{kept}. A smaller --lr usually helps, or --precision fp32")
        finally:
            for line in lines:
                line.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
        if interrupted:
            if rank() == 0:
                print(f"interrupted at update {self.step}; the same command goes on from there", file=sys.stderr)
            raise SystemExit(130)

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
        """One update's numbers, averaged over LOG_EVERY updates into a row of metrics.csv: scalars (0-d tensors or floats), or
        vectors (k,), which become the columns name_1 to name_k."""
        values = {n: torch.as_tensor(v, dtype=torch.float32, device=self.c.device).detach() for n, v in values.items()}
        self.columns = {n: [n] if v.ndim == 0 else [f"{n}_{i}" for i in range(1, len(v) + 1)] for n, v in values.items()}
        self.window.append(torch.cat([v.reshape(-1) for v in values.values()]))

    def _flush(self):
        """Write the row of the updates since the last one; stop if any value in it is not finite. Returns it as text."""
        if not self.window:
            return ""
        table = torch.stack(self.window)
        if world() > 1:
            dist.all_reduce(table)
        table = table.cpu().double() / world()
        if len(bad := (~table.isfinite()).any(1).nonzero()):
            raise FloatingPointError(f"the loss of update {self.step - len(table) + 1 + int(bad[0])}")
        means = table.mean(0).tolist()
        if rank() == 0:
            with inputs(), open(self.table, "a", newline="") as file:
                rows = csv.writer(file)
                if not file.tell():
                    rows.writerow(["step", "seconds", *sum(self.columns.values(), [])])
                rows.writerow([self.step, f"{self.seconds:.2f}", *[f"{m:.9g}" for m in means]])
        self.window = []
        means = iter(means)
        self.last = {n: [next(means) for _ in columns] for n, columns in self.columns.items()}
        return ", ".join(f"{n} {v[0]:.4f}" if len(v) == 1 else f"{n} " + " ".join(f"{x:.2f}".removeprefix("0") for x in v)
                         for n, v in self.last.items())

    def warn(self, message):
        """Say it above the bar, on stderr; None is nothing to say. run.last, {name: [means]}, is the row written last, {} before."""
        if message and rank() == 0:
            from tqdm import tqdm
            tqdm.write(f"update {self.step}: {message}", file=sys.stderr)

    def save(self):
        """Write checkpoint.pt: all or nothing, and no weights that are not finite."""
        for thing in self.states.values():
            if isinstance(thing, torch.nn.Module) and not all(p.isfinite().all() for p in thing.parameters()):
                raise FloatingPointError(f"a weight after update {self.step}")
        if rank() == 0:
            saved = dict(method=self.c.method, config=self.config, data=self.data, source=self.c.data, step=self.step,
                         seconds=self.seconds, **{name: thing.state_dict() for name, thing in self.states.items()})
            with inputs(), written(self.path) as file:
                try:
                    torch.save(saved, file)
                except RuntimeError as fault:  # PyTorch's word for a full disk
                    raise OSError(fault) from None


def finish(c, trained):
    """After --train: loss.png, a word if nothing was left to train, and --sample where a run would be left without a sheet."""
    if rank() == 0:
        from common import pictures
        pictures.curves(c.run)
        if not trained:
            print(f"{c.run} is already trained: give more --iters or --minutes, or --fresh to start over")
        if not c.sample:
            c.sheet = 0  # --n is for --evaluate
        c.sample = c.sample or trained or not (c.run / "samples.png").exists()


# ---------------------------------------------------------------------------------------------- sampling and judging
def progress(steps, what):
    """tqdm over a sequence, gone when it ends."""
    from tqdm import tqdm
    return tqdm(steps, desc=what, leave=False, disable=rank() != 0 or not sys.stderr.isatty())


_graphs = {}  # of replayed: key -> c, the arguments it holds, the graph or None, what it returns


def replayed(c, step, *args):
    """step(c, *args) -> tensors; on CUDA by a CUDA graph, which spares the time between the step's launches.

    The first call captures; later ones with the same step, the same other arguments (networks, flags: by identity) and tensors of
    the same shapes copy their tensors into the graph and replay it. What it returns holds until its next replay. A step that
    cannot be captured is called as it is, and why is said.
    """
    if c.device.type != "cuda":
        return step(c, *args)
    key = (step, id(c), *((a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else id(a) for a in args))
    if key not in _graphs:
        held = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        _graphs[key] = c, held, *_captured(c, step, held)  # with c and held kept, no other object gets their id
    _, held, graph, result = _graphs[key]
    if graph is None:
        return step(c, *args)
    for mine, now in zip(held, args):
        if isinstance(mine, torch.Tensor):
            mine.copy_(now)
    graph.replay()
    return result


def _captured(c, step, held):
    """The graph of step(c, *held) and its result; None, None where that cannot be."""
    before, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        side.wait_stream(before)
        with torch.cuda.stream(side):  # compiles, and lets the libraries take their work space
            for _ in range(2):
                step(c, *held)
        before.wait_stream(side)
        with torch.cuda.graph(graph):
            return graph, step(c, *held)
    except RuntimeError as fault:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
        print(f"sampling without a CUDA graph: {' '.join(str(fault).split())}", file=sys.stderr)
        return None, None


class Stopwatch:
    """`for first, size in watch.batches(n):` counts off n samples and times the loop's body, which ends with them on the CPU."""

    def __init__(self, device):
        self.laps = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def batches(self, n, size=256):
        """(first, how many) of each batch."""
        for first in range(0, n, size):
            start, many = time.perf_counter(), min(size, n - first)
            yield first, many
            self.laps.append((many, time.perf_counter() - start))

    def ms(self):
        """Milliseconds per image: the median of the batches after the first, which warms up (of the first if it is alone)."""
        return statistics.median(1000 * s / n for n, s in self.laps[1:] or self.laps)

    def report(self, evaluations, path):
        """The line that ends sampling."""
        n, s = (sum(column) for column in zip(*self.laps))
        warm = " once warm" if len(self.laps) > 1 else ""
        return f"{n} samples in {s:.1f} s, {evaluations} network evaluations each, {self.ms():.3g} ms per sample{warm}: {path}"


def draw(c, sample, n, label=None):
    """n samples, a batch at a time on the CPU, and the stopwatch that timed them. sample(first, how many, labels); label: (n,) or None."""
    watch = Stopwatch(c.device)
    x = torch.cat([sample(first, size, None if label is None else label[first:first + size]).cpu() for first, size in watch.batches(n)])
    with inputs():
        if not x.isfinite().all():  # as uint8 they would be black pictures
            raise ValueError(f"{c.checkpoint} draws samples that are not finite: sample from another checkpoint, or with --precision fp32")
    return x, watch
