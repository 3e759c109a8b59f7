"""Flags: what each may be, what they are worth by layers, and which of them rule out each other.

A script declares its own in a dataclass of `option`s, takes the groups below that it obeys, and
gives the values of groups in RECIPES. This file knows no method, no network and no run.

    FLAGS = (Config, flags.Unet, flags.Training, flags.Labels, flags.Guidance)
    c = flags.parse("ddpm", FLAGS, RECIPES, __doc__)        # from the command line
    c = flags.settings("ddpm", FLAGS, RECIPES, lr=1e-3)     # from Python

Only torch and the standard library are imported, so that --help and wrong flags answer at once.
"""
import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import sys
from difflib import get_close_matches
from pathlib import Path

import torch

from common import files
from common.data import NAMED, POINTS, title
from common.files import stop
from common.processes import rank

ACTIONS = dict(train="train the model, or finish training it", sample="draw samples",
               evaluate="judge samples against the data")
ALL = " ".join(ACTIONS)
MOST = 10 ** 9  # of any whole number that says no more of itself
INIT = "give --init the checkpoint of a run"
KINDS = {int: ("N", "a whole number"), float: ("X", "a number"),
         tuple: ("A,B", "whole numbers, e.g. 1,2"), str: ("TEXT", "text")}


# --------------------------------------------------------------------------------- declarations
def option(default, help, use="train", low=None, high=None, above=None, choices=None, part=int,
           repeated=False, acts=False, needs="", idles="", one_for_each="", of_pictures=False,
           of_model=False, fp32=()):
    """A field of a dataclass that is a flag too.

    use: the actions that read it; given without one of these, it is an error. What --train reads
    belongs to the model: a checkpoint keeps it.
    low, high: bounds that are allowed, and above: one that is not; high may name another flag,
    which sets no bound where it is 0. A whole number without one is at most MOST.
    part: of a tuple given as a,b,c; Path: any number of files. repeated: of a tuple whose parts
    are given one by one, by as many of the flag.
    acts: given alone, such a flag asks for --sample.
    needs: flags that must not be off (False, empty, or at their low bound) for this one to do
    anything, a|b for one of the two; idles: flags that do nothing beside this one. Given all the
    same, they are an error.
    one_for_each: a flag that says how many numbers a tuple has, if not none.
    of_pictures: an error with points. of_model: --init takes it from the file, since the weights
    there mean nothing without it. fp32: values for which bf16 is too coarse.
    """
    return dataclasses.field(default=default, metadata=locals())


@dataclasses.dataclass
class Shared:
    """What all scripts have, without naming it."""
    data: str = option("digits", f"{', '.join(NAMED)}, or a folder or archive (.zip .tar .tar.gz "
                       ".tar.xz) of pictures", ALL)
    data_root: str = option("data", "where named data sets are kept and fetched to", ALL)
    size: int = option(0, "resize pictures to this side; 0: the data's own, of a path at most 64, "
                       "or 32 without a GPU", ALL, low=0, high=4096, of_pictures=True)
    classes: tuple = option((), "keep only these classes, e.g. airplane,bird", ALL, part=str,
                            of_pictures=True)
    run: str = option("", "folder of the run; default runs/<method>-<data>", ALL)
    init: str = option("", "begin with the weights of this checkpoint, and with its network, T, "
                       "schedule, prediction and size: fine-tuning")
    fresh: bool = option(False, "start over, whatever the folder holds")
    n: int = option(0, "how many samples; default 64 pictures or 1000 points, and 1000 for "
                    "--evaluate", "sample evaluate", low=1, high=10 ** 7)
    seed: int = option(0, "of every random number", ALL, low=0, high=2 ** 63 - 1)
    out: str = option("", ".png a grid, .gif the trajectory, .npz, or a folder of PNGs; default "
                      "samples.png in the run", "sample")
    checkpoint: str = option("", "sample from this file instead of the run's own",
                             "sample evaluate")
    inception: str = option("", "the standard Inception network as a TorchScript file, for FID "
                            "and IS", "evaluate", of_pictures=True)
    device: str = option("auto", "where to compute", ALL, choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "bf16: mixed; auto: bf16 where the hardware has it", ALL,
                            choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the networks: slow to start, faster to run", ALL)
    graph: bool = option(False, "on a CUDA GPU, record an update as a graph and replay it, which "
                         "launches all its kernels at once")


# The groups that a script may take. They carry no values: those stand in its RECIPES, first row.
@dataclasses.dataclass
class Unet:
    """The network's size. Points have an MLP, of which width alone is set."""
    width: int = option(0, "channels at full resolution", low=1, of_model=True)
    multipliers: tuple = option((), "of the width, one for each level of the U-Net", low=1, high=64,
                                of_pictures=True, of_model=True)
    blocks: int = option(0, "residual blocks a level", low=1, high=64, of_pictures=True,
                         of_model=True)
    attention: tuple = option((), "sides of the maps that attend, where there are such; none: ''",
                              low=1, of_pictures=True, of_model=True)
    heads: int = option(0, "attention heads", low=1, needs="attention", of_pictures=True,
                        of_model=True)
    resample: str = option("conv", "between levels", choices=("conv", "biggan"), of_pictures=True,
                           of_model=True)


@dataclasses.dataclass
class Training:
    """How long, how many, how fast."""
    iters: int = option(0, "updates in all", low=1)
    minutes: float = option(0.0, "minutes of training in all; 0: no limit", low=0)
    batch: int = option(0, "pictures in an update", low=1, high=10 ** 6)
    lr: float = option(0.0, "learning rate of Adam", above=0)
    ema: float = option(0.0, "decay of the mean of the weights that samples are drawn with",
                        low=0, high=0.999999)
    flip: bool = option(False, "mirror half of the pictures", of_pictures=True)


@dataclasses.dataclass
class Labels:
    """Classes."""
    conditional: bool = option(False, "learn class labels too", of_model=True)
    label: str = option("", "draw only this class, by name or number; default each in turn",
                        "sample", needs="conditional")


@dataclasses.dataclass
class Guidance:
    """Without a classifier (Ho 2022): a tenth of the labels is dropped in training."""
    guidance: float = option(1.0, "classifier-free guidance: eps + (w - 1)(eps - eps without "
                             "label)", "sample evaluate", low=0, needs="conditional|captions")


# ---------------------------------------------------------------------------------------- values
def _flag(name):
    return "--" + name.replace("_", "-")


def text(value):
    """A flag's value as the user would write it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return str(value)


def unfit(m, values):
    """The bound of an option's metadata that one of the values breaks, in words; None: they fit."""
    for v in values:
        bound = MOST if isinstance(v, int) else math.inf
        high = bound if m["high"] is None or isinstance(m["high"], str) else m["high"]
        if isinstance(v, float) and not math.isfinite(v):
            return "finite"
        if m["low"] is not None and v < m["low"]:
            return f"at least {m['low']}"
        if m["above"] is not None and v <= m["above"]:
            return f"more than {m['above']}"
        if m["choices"] is not None and v not in m["choices"]:
            return f"of {m['choices']}"
        if not isinstance(v, (str, Path)) and v > high:
            return f"at most {high}"
    return None


def _read(field, given):
    """A flag's value from the command line's text."""
    m, kind = field.metadata, type(field.default)
    try:
        parts = filter(None, given.split(","))
        values = tuple(map(m["part"], parts)) if kind is tuple else (kind(given),)
    except ValueError:
        wanted = "numbers, e.g. 0.5,1" if m["part"] is float else KINDS[kind][1]
        raise argparse.ArgumentTypeError(f"{given!r} is not {wanted}") from None
    wrong = unfit(m, values)
    if wrong:
        raise argparse.ArgumentTypeError(f"{given} is not {wrong}")
    return values if kind is tuple else values[0]


def _parser(method, fields, recipes, doc):
    parser = argparse.ArgumentParser(f"{method}.py", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)

    def error(message):
        wrong = message.partition("unrecognized arguments: ")[2].split()
        like = get_close_matches(wrong[0], map(_flag, [*ACTIONS, *fields]), 1) if wrong else []
        meant = f": did you mean {like[0]}?" if like else ""
        stop(f"{message}{meant} (python {method}.py --help lists the flags)")

    parser.error = error
    for action, help in ACTIONS.items():
        parser.add_argument(f"--{action}", action="store_true", help=help)
    sections = {}
    for name, field in fields.items():
        m, kind, use = field.metadata, type(field.default), field.metadata["use"]
        if use not in sections:
            sections[use] = parser.add_argument_group("for --" + use.replace(" ", ", --"))
        values = {"default": field.default}
        for row, changes in recipes.items():
            if name in changes and not callable(changes[name]):
                values[row or "default"] = changes[name]
        if values["default"] in ("", 0, -1, (), False):
            del values["default"]
        shown = "; ".join(f"{row} {text(value)}" for row, value in values.items())
        help = m["help"] + (f" ({shown})" if shown else "")
        if m["part"] is Path:
            more = dict(nargs="*", metavar="FILE")
        elif m["repeated"]:
            more = dict(action="append", type=m["part"], metavar="TEXT")
        elif kind is bool:
            more = dict(action=argparse.BooleanOptionalAction if values else "store_true")
        elif m["choices"]:
            more = dict(type=functools.partial(_read, field), choices=m["choices"])
        else:
            more = dict(type=functools.partial(_read, field), metavar=KINDS[kind][0])
        sections[use].add_argument(_flag(name), help=help.replace("%", "%%"), **more)
    return parser


def _lay(method, groups, recipes, given):
    """The flags' values: by the options, each row of RECIPES that applies, --init, and as given.

    Every row that applies is laid over those above it, in the table's order:
        ""              always
        "digits", ...   the data's own, or a folder's by its name; "pictures": any other path
        "cpu"           a circumstance: where there is no GPU, or --device cpu
        "T=1", ...      a circumstance: where that flag has that value by what else is laid
        "init"          a circumstance: where that flag is given at all
    A value may be a function of all the others. Given --iters or --minutes replace both of the
    data's. Also set: method, name (of the data), fields (the declared ones), given (their names),
    defaults (of the options and row ""), recipes, sheet (samples to draw; 0: as many as fit the
    data), text (the script's own), instead (what the row "cpu" changed: the values without it).

    What "cpu" sets is taken from the run's own checkpoint where there is one (iters and minutes,
    where they are the full recipe's): so a run keeps its network and its pictures' size when it
    goes on elsewhere.
    """
    fields = {f.name: f for group in (*groups, Shared) for f in dataclasses.fields(group)}
    data = given.get("data", fields["data"].default)
    called = title(data)
    c = argparse.Namespace(method=method, fields=fields, given=fields.keys() & given)
    c.name = f"pictures-{called}" if called in NAMED and data not in NAMED else called
    c.run = Path(given.get("run") or f"runs/{method}-{c.name}")
    c.text = _text_of(groups[0])

    of_folders = {row for row in recipes if row and "=" not in row} - {*NAMED, *fields, "cpu"}
    own = called.lower().replace("_", "-")
    row_of_data = data if data in NAMED else own if own in of_folders else "pictures"
    replaced = {"iters", "minutes"} if given.keys() & {"iters", "minutes"} else set()
    of_run, ends = _of_run(c, given, recipes)
    of_file = of_run | _of_file(c, given)
    defaults = {name: f.default for name, f in fields.items()} | recipes.get("", {})

    def laid(circumstances=()):
        worth = dict(defaults)
        for row, changes in recipes.items():
            if row and row == row_of_data or row in circumstances:
                worth |= {name: value for name, value in changes.items() if name not in replaced}
        return worth | of_file | given

    on_cpu = ["cpu"] if _without_gpu(given) else []
    worth = laid(on_cpu)
    circumstances = [*on_cpu]
    for row in recipes:
        name, equals, value = row.partition("=")
        if equals and text(worth[name]) == value or row in fields and worth[row]:
            circumstances.append(row)
    worth = dict.fromkeys(ACTIONS, False) | laid(circumstances)
    vars(c).update({name: value for name, value in worth.items() if name != "run"})
    c.defaults, c.chosen, c.recipes = defaults, worth["classes"], recipes
    full = laid([row for row in circumstances if row != "cpu"])
    if ends and ends == [full["iters"], full["minutes"]] and not replaced:
        c.iters, c.minutes = ends  # it began where there was a GPU, and had all that time
    c.instead = {name: value for name, value in full.items() if value != worth[name]}
    c.sheet = c.n
    for name in fields:
        setattr(c, name, _worth(c, name, getattr(c, name)))
    return c


def _without_gpu(given):
    """Whether what was given, or the machine, leaves the processor alone."""
    device = given.get("device", "auto")
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    return device == "cpu" or device == "auto" and not there


def _of_run(c, given, recipes):
    """What row "cpu" sets, as the run's checkpoint has it, with the pictures' size; its ends."""
    path = c.run / "checkpoint.pt"
    if not path.exists():  # of a method in stages the first one may be there
        path = c.run / "autoencoder" / "checkpoint.pt"
    if given.get("fresh") or given.get("checkpoint") or not path.exists():
        return {}, None
    try:
        saved = files.load_checkpoint(path, (c.method,), keep=True)
        values = {}
        for name in recipes.get("cpu", {}).keys() - {"iters", "minutes"}:
            if name in saved["config"]:
                values[name] = checked(c.fields[name], saved["config"][name], path)
    except (ValueError, OSError):
        return {}, None  # it will be told by who reads it whole
    if len(saved["data"]["shape"]) == 3 and given.get("data", "") not in ("", *NAMED):
        values["size"] = saved["data"]["shape"][-1]
    return values, [saved["config"].get(name) for name in ("iters", "minutes")]


def full_recipe(c, capped=False):
    """Where there is no GPU: what was taken for that, and the flags that have all; "" otherwise.

    capped: whether pictures were made smaller because nothing said how large they should be.
    """
    fewer = {name: value for name, value in c.instead.items() if getattr(c, name) != value
             and not (c.name in POINTS and c.fields[name].metadata["of_pictures"])}

    def said(name, value, before=""):
        """As words; with before="--" as a flag."""
        dash = "-" if before else " "
        called = before + name.replace("_", dash)
        if isinstance(value, bool):
            return called if value else f"{before}no{dash}{name.replace('_', dash)}"
        if before and value == ():
            return f"{called} ''"
        return f"{called} {value:g}" if isinstance(value, float) else f"{called} {text(value)}"

    taken = [said(name, getattr(c, name)) for name in fewer]
    whole = [said(name, value, "--") for name, value in fewer.items()]
    if capped and most(c) < 64 and "size" not in c.given:
        taken.append(f"{most(c)} x {most(c)} pixels at most")
        whole.append("--size 64")
    return f"without a GPU: {', '.join(taken)}; the full recipe: {' '.join(whole)}" if taken else ""


def most(c):
    """The side that pictures of a folder get at most, where --size says nothing."""
    return 32 if c.device.type == "cpu" else 64


def _text_of(group):
    """The text of the file that a class stands in, "" where there is none."""
    file = getattr(sys.modules.get(group.__module__), "__file__", None)
    with contextlib.suppress(OSError, TypeError, UnicodeError):
        return Path(file).read_text(encoding="utf-8")
    return ""


def _of_file(c, given):
    """What --init takes from its file: the options of_model, and the pictures' size.

    From the run's own checkpoint where there is one to go on from: the file is read at update 0
    only, and need not be there any more.
    """
    if not given.get("init"):
        return {}
    own = c.run / "checkpoint.pt"
    path = own if own.exists() and not given.get("fresh") else given["init"]
    with files.inputs():
        saved = files.load_checkpoint(path, (c.method,), INIT, keep=True)
        values = {}
        for name, field in c.fields.items():
            if field.metadata["of_model"] and name in saved["config"]:
                values[name] = checked(field, saved["config"][name], path)
    if len(saved["data"]["shape"]) == 3 and c.name not in POINTS:
        values["size"] = saved["data"]["shape"][-1]
    return values


def checked(field, value, path):
    """A flag's value as a checkpoint has it: nothing in a file is believed. Else a ValueError."""
    value = tuple(value) if isinstance(value, list) else value
    each = value if isinstance(value, tuple) else (value,)
    if not isinstance(value, type(field.default)) or unfit(field.metadata, each):
        raise ValueError(f"{path} is damaged: {field.name} = {value!r}")
    return value


def _worth(c, name, value):
    """A recipe's value as the option's type: 14 is 14.0 too, and a function is asked."""
    value = value(c) if callable(value) else value
    kind = type(c.fields[name].default)
    return value if name == "run" or isinstance(value, kind) else kind(value)


def brought(c):
    """Set what rows of RECIPES say of flags that only sampling reads, where the model makes them.

    Such a row bears the name of a flag that the checkpoint's model has: the data, whose row may
    have set it in training, need not be named again to sample.
    """
    for row, changes in c.recipes.items():
        for name, value in changes.items() if row in c.fields and getattr(c, row) else ():
            if "train" not in c.fields[name].metadata["use"] and name not in c.given:
                setattr(c, name, _worth(c, name, value))


def default(c, name):
    """What a flag is worth where nothing is said: by row "" of RECIPES, or by its option."""
    return _worth(c, name, c.defaults[name])


def trained_fields(c):
    """Names of the flags that belong to a trained model, as a checkpoint keeps them."""
    shared = {f.name for f in dataclasses.fields(Shared)}
    own = [n for n, f in c.fields.items() if "train" in f.metadata["use"] and n not in shared]
    return [*own, "seed"]


def values(c):
    """What a captured graph depends on: names and plain values of c, flags and what was set since.

    The seed is left out, which is a tensor among a graph's arguments, and where things are kept.
    """
    left_out = {"seed", "n", "sheet", "out", "run", "checkpoint", "fresh", "init", "text",
                "vocabulary", *ACTIONS}
    plain = (int, float, str, tuple, type(None))  # bool is an int; other objects are not seen
    found = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(c).items() if name not in left_out}
    return tuple(sorted((name, value) for name, value in found.items()
                        if isinstance(value, plain)))


# ----------------------------------------------------------------------------------------- rules
def _off(c, name):
    value = getattr(c, name)
    return value in (False, (), "") or value == c.fields[name].metadata["low"]


def rules(c):
    """Stop for a flag that was given and does nothing, or passes the bound that another one sets.

    Called before training, and again when a checkpoint has said what its model is.
    """
    only_pictures(c)
    of_model = set(trained_fields(c))
    for name in sorted(c.given):
        m = c.fields[name].metadata
        idle = name not in of_model and getattr(c, name) == default(c, name)  # changes nothing
        for needs in m["needs"].split():
            there = [need for need in needs.split("|") if need in c.fields]
            if idle or not all(_off(c, need) for need in there):
                continue
            need = there[0]
            if need in of_model and name not in of_model and not c.train:
                stop(f"{_flag(name)} needs a model trained with {_flag(need)}: leave it out")
            absent = getattr(c, need) is False or getattr(c, need) == ""
            how, worth = ("without", "") if absent else ("with", f" {text(getattr(c, need))}")
            stop(f"{_flag(name)} does nothing {how} {_flag(need)}{worth}: leave it out")
        on = getattr(c, name) not in (False, "")
        for other in m["idles"].split() if on else ():
            bare = other in c.fields and c.fields[other].metadata["part"] is Path  # needs no value
            if other in c.given and (bare or getattr(c, other) != default(c, other)):
                stop(f"{_flag(other)} does nothing with {_flag(name)}: leave it out")
        count = getattr(c, m["one_for_each"]) if m["one_for_each"] else None
        if count is not None and len(getattr(c, name)) not in (0, count):
            stop(f"{_flag(name)} has {len(getattr(c, name))} numbers for {m['one_for_each']} = "
                 f"{count}: give one for each")
        if isinstance(m["high"], str) and 0 < getattr(c, m["high"]) < getattr(c, name):
            high = getattr(c, m["high"])
            stop(f"{_flag(name)} {getattr(c, name)} is more than {_flag(m['high'])} {high}: "
                 f"choose from {m['low']} to {high}")


def only_pictures(c):
    """Stop for a flag of pictures that was given where there are points."""
    for name in sorted(c.given):
        if c.fields[name].metadata["of_pictures"] and c.name in POINTS:
            stop(f"{_flag(name)} is for pictures, and {c.name} has points: leave it out")


def _paths(c):
    """Stop for a path that cannot be what the flag says."""
    if c.data not in NAMED and not os.path.exists(c.data):
        stop(f"--data {c.data}: no such file or folder, and no data set of that name "
             f"({', '.join(NAMED)})")
    if os.path.isfile(c.run):
        stop(f"--run {c.run} is a file: give a folder")
    if c.checkpoint and c.train:
        stop("--checkpoint is for sampling, and --train goes on from its run's own: leave out one")
    if c.inception and not os.path.isfile(c.inception):
        stop(f"--inception {c.inception}: no such file")
    if not c.out:
        return
    out = Path(c.out)
    if out.suffix not in (".png", ".gif", ".npz", ""):
        stop(f"--out {out}: unknown ending, use .png, .gif, .npz or a folder")
    if c.data in POINTS and not out.suffix:
        stop(f"--out {out}: points go into a .png, .gif or .npz")
    if not out.suffix and os.path.isdir(out) and os.access(out, os.R_OK) and os.listdir(out):
        stop(f"--out {out} holds files already, and samples would mix with them: give a new folder")
    if c.n > 256 and out.suffix == ".gif" and c.data not in POINTS:
        stop(f"--n {c.n}: a .gif shows at most 256 samples")
    above = (out.parent if out.suffix else out, *out.parents)
    folder = next(place for place in above if os.path.exists(place))
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if out.suffix and os.path.isdir(out) or not writable:
        stop(f"--out {out} cannot be written: there is a folder of that name, or {folder} is not "
             "a folder to write in")


# ------------------------------------------------------------------------------------ both ways in
def parse(method, groups, recipes, doc):
    """The command line as one namespace: the actions, and every flag's value, by _lay's layers.

    method: the script's name, which runs and checkpoints bear; groups: dataclasses of options;
    recipes: the table of layers; doc: the help's head. Ends with exit status 2 and one line for
    whatever is wrong with a flag; without an action prints the help and ends.
    """
    files.program = f"{method}.py"
    sys.excepthook = files.excepthook
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background
        # until Run takes it over, while it trains
        signal.signal(signal.SIGINT, _interrupted)
    fields = {f.name: f for group in (*groups, Shared) for f in dataclasses.fields(group)}
    parser = _parser(method, fields, recipes, doc)
    dashed(sys.argv[1:])
    flagged = vars(parser.parse_args())
    flagged |= {name: tuple(value) for name, value in flagged.items() if isinstance(value, list)}
    actions = {name: flagged.pop(name) for name in ACTIONS if name in flagged}
    if any(fields[name].metadata["acts"] for name in flagged):
        actions["sample"] = True
    if not actions:
        parser.print_help()
        print(f"\nGive at least one of {', '.join(map(_flag, ACTIONS))}.")
        parser.exit()
    c = _lay(method, groups, recipes, flagged)
    vars(c).update(actions)
    for name in sorted(c.given):
        use = fields[name].metadata["use"]
        if not any(action in use for action in actions):
            stop(f"{_flag(name)} does nothing here: it belongs to --{use.replace(' ', ' or --')}")
    only_pictures(c)
    _paths(c)
    if c.train:
        rules(c)  # what a checkpoint brings is not known yet
    elif rank() > 0:
        raise SystemExit(0)  # one process samples
    place(c)
    return c


def _interrupted(number, frame):
    print("interrupted", file=sys.stderr)
    raise SystemExit(130)


def dashed(arguments):
    """Stop for --flag=--, for which argparse sets no value but an empty list."""
    for word in arguments:
        if re.fullmatch(r"--[\w-]+=--", word):
            stop(f"{word}: -- is no value")


def settings(method, groups, recipes, **given):
    """The same namespace from Python, of flags by name; what is wrong with one is a ValueError.

    settings("ddim", FLAGS, RECIPES, checkpoint="runs/mine/checkpoint.pt", device="cpu")

    With a checkpoint to sample from, a flag that only training reads is an error, and so is one
    that sample takes as an argument.
    """
    fields = {f.name: f for group in (*groups, Shared) for f in dataclasses.fields(group)}
    for name, value in given.items():
        if name not in fields:
            raise ValueError(f"{method}.py has no flag {_flag(name)}")
        m = fields[name].metadata
        given[name] = _as_flag(fields[name], value)
        wrong = unfit(m, given[name] if isinstance(given[name], tuple) else (given[name],))
        if wrong:
            raise ValueError(f"{_flag(name)} {text(value)} is not {wrong}")
        if given.get("checkpoint") and "sample" not in m["use"] and "evaluate" not in m["use"]:
            raise ValueError(f"{_flag(name)} is for training: the checkpoint says what it is")
        if given.get("checkpoint") and name in ("label", "steps", "n", "out", "prompt", "image",
                                                "mask", "walk"):
            raise ValueError(f"load has no use for {name}: it is an argument of sample, or a flag "
                             "of the command alone")
    c = _lay(method, groups, recipes, given)
    only_pictures(c)
    place(c)
    return c


def _as_flag(field, value):
    """A value from Python as the flag's type, or a ValueError: 3 is 3.0 too, a list a tuple."""
    kind, part = type(field.default), field.metadata["part"]

    def one(kind, value):
        if kind is bool or isinstance(value, bool):
            fits = kind is bool and isinstance(value, bool)
        elif kind is float:
            fits = isinstance(value, (int, float))
        elif kind in (str, Path):
            fits = isinstance(value, (str, os.PathLike, torch.device)) or field.name == "label"
        else:
            fits = isinstance(value, kind)
        if not fits:
            wanted = {Path: "a path", bool: "True or False"}.get(kind) or KINDS[kind][1]
            raise ValueError(f"{_flag(field.name)} {value!r} is not {wanted}")
        return kind(value)

    if kind is not tuple:
        return one(kind, value)
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{_flag(field.name)} {value!r} is not a list or tuple")
    return tuple(one(part, each) for each in value)


# ------------------------------------------------------------------------------------------ where
def device(name="auto"):
    """The torch.device of that name, under torchrun a GPU for each process; auto: the best here."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d in there if there[d]) if name == "auto" else name
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not there[name]:
        stop(f"--device {name}: PyTorch finds none here; leave it out, or give --device cpu")
    if name == "cuda" and processes > torch.cuda.device_count():
        stop(f"--device {name}: {processes} processes, and PyTorch finds "
             f"{torch.cuda.device_count()} here; start fewer, or give --device cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def place(c):
    """Set c.device, and c.precision.

    auto is bf16 on GPUs that have it and on processors with matrix units (AMX), elsewhere fp32,
    which is faster there: AVX-512's bf16 reached half of fp32's rate in convolutions.
    """
    c.device = device(c.device)
    name = c.device.type
    if c.graph and name != "cuda":
        stop(f"--graph is for a CUDA GPU, and this is {name}: leave it out")
    if c.precision == "auto":
        # a private name of PyTorch's, absent in some releases: then fp32
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)
        has_bf16 = dict(cuda=torch.cuda.is_bf16_supported, cpu=amx).get(name, bool)
        c.precision = "bf16" if has_bf16() else "fp32"
    resolve(c)


def resolve(c):
    """Set c.precision to fp32 where bf16 is too coarse: by a flag's value, and for points.

    x_{t-1}, for a network that predicts its mean, differs little from x_t, and a mode of points is
    0.01 wide. bf16 that was asked for is then an error.
    """
    coarse = ["points"] if c.name in POINTS else []
    for name, field in c.fields.items():
        if getattr(c, name) in field.metadata["fp32"]:
            coarse.append(f"{_flag(name)} {getattr(c, name)}")
    if c.precision == "bf16" and coarse:
        if "precision" in c.given:
            stop(f"--precision bf16 is too coarse for {coarse[0]}: leave it out")
        c.precision = "fp32"


def autocast(c):
    """The context for a forward pass: bf16 mixed precision where c.precision says so."""
    return torch.autocast(c.device.type, torch.bfloat16, enabled=c.precision == "bf16")
