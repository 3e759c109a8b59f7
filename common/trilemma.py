"""The generative learning trilemma, measured: every method, the same minutes, one table.

    python -m common.trilemma                      # digits, 15 minutes a method
    python -m common.trilemma --minutes 1          # a rehearsal
    python -m common.trilemma --data stacked --minutes 5 --methods ddpm,ddgan

The plain GAN and the six scripts are trained for the same minutes with a U-Net of one size, sample
with one grid of step counts, and are judged by the same numbers. What is done is kept in runs/
trilemma/<data>-<minutes>: the same command again finishes what was interrupted, trains and judges
nothing twice, and draws table and pictures anew.

It starts the scripts as programs and reads what they leave and print; it calls nothing in them and
knows of each but its name, its flags and the steps that it can take.
"""
import argparse
import csv
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

from common import early  # first, since torch takes seconds
import torch

from common import data, files, flags, metrics
from common.runs import differs
from common.files import inputs, load_checkpoint, stop, written
from common.pictures import grid, scatter

SCRIPTS = Path(__file__).resolve().parent.parent
GRID = (1, 2, 4, 10, 20, 50, 250)  # network evaluations
SEEDS = 3  # of sampling; one above MANY evaluations
MANY = 100
FULL = 15.0  # minutes; below, there is time for one seed and these
SHORT = (1, 4, 20, 50)
JUDGING = 1.0  # of the training's time, at most
LEAST_SQUARES = 0.4  # of ddgan.py's updates, at most
TRIAL, LONGER = 0.12, 0.5  # minutes to learn ddgan.py's pace in: a thirtieth, between these two
STRIP = 12  # pictures of each method


@dataclasses.dataclass
class Method:
    """A script, its paper on arXiv, the steps of GRID that it can take and is shown with, flags."""
    script: str
    paper: str
    arxiv: str
    steps: tuple
    shown: int
    flags: tuple = ()
    of_pictures: tuple = ()  # flags beside these, where the data are pictures
    bits: bool = False  # --evaluate gives bits/dim
    points: bool = True  # 2-D data will do


METHODS = {
    "ddpm": Method("ddpm.py", "Ho 2020", "2006.11239", GRID, 250, bits=True),
    "ddim": Method("ddim.py", "Song 2020", "2010.02502", GRID, 50),
    "vdm": Method("vdm.py", "Kingma 2021", "2107.00630", GRID, 50, of_pictures=("--no-plain",),
                  bits=True),
    "ddgan": Method("ddgan.py", "Xiao 2021", "2112.07804", (4,), 4, ("--T", "4")),
    "ldm": Method("ldm.py", "Rombach 2021", "2112.10752", GRID, 50,
                  of_pictures=("--no-captions",), points=False),
    "shortcut_mcmc": Method("shortcut_mcmc.py", "Chen 2023", "2301.01206", GRID[:-1], 20),  # of 200
    "gan": Method("ddgan.py", "Goodfellow 2014", "1406.2661", (1,), 1, ("--T", "1")),
}


# ------------------------------------------------------------------------------ scripts as programs
class Failed(Exception):
    """A script ended with an error: its last words."""


def start(*arguments, quiet=False):
    """Run a script to its end and return what it printed. Failed where it fails.

    Its bars and warnings are shown, unless quiet. Where this program is interrupted the script is
    told, and has its time to save.
    """
    command = [sys.executable, *map(str, arguments)]
    errors = subprocess.PIPE if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        try:
            told, complaint = child.communicate()
        except KeyboardInterrupt:
            child.terminate()  # a Ctrl-C has reached it too, and a second one would not let it save
            child.wait()
            raise
    if child.returncode == 130:
        raise KeyboardInterrupt
    if child.returncode:
        said = (complaint or "").strip().splitlines()
        raise Failed(said[-1] if said else f"{Path(arguments[0]).name} ended with exit status "
                     f"{child.returncode}")
    return told


def read(path):
    """What a JSON file holds; {} where there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}


def keep(path, what):
    """Write a dict as a JSON file."""
    with inputs(), written(path) as file:
        file.write_text(json.dumps(what, indent=1) + "\n")


def identity(path):
    """What tells a checkpoint from another one under its name: hex digits of its content."""
    about = path.stat()
    return _digits(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache
def _digits(path, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Contest:
    """Who takes part, on which data, for how long, and where everything is kept."""

    def __init__(self, given):
        self.data, self.root, self.minutes = given.data, given.data_root, given.minutes
        named = self.data in data.NAMED
        title = data.title(self.data)
        title = f"pictures-{title}" if title in data.NAMED and not named else title
        self.folder = Path("runs") / "trilemma" / f"{title}-{given.minutes:g}"
        self.full = given.minutes >= FULL
        self.n = given.n or (1000 if self.full else 500)
        self.device = flags.device()
        with inputs():
            train, test = (data.load(self.data, self.root, split=split, most=flags.most(self))
                           for split in ("train", "test"))
            data.judgeable(train, self.n)
            lacks = metrics.computable(self.n, len(train), len(test))[1]
            if lacks:
                stop(f"{self.data} has too few pictures to compare methods by: {lacks[0]}")
            self.points = train.images is None
            self.size = None if named else train.shape[-1]
            self.remember(train)
            if not self.points:  # made now, lest its time be counted as judging
                source = "digits" if self.data == "stacked" else self.data
                net, _, _ = metrics.classifier(source, self.root, train.shape[-1],
                                               device=self.device)
                metrics.references(net, train, test, self.n, self.root, self.device)
        self.names = [name for name in given.methods if METHODS[name].points or not self.points]

    def remember(self, train):
        """Keep in the folder which data these are; stop where it was made with others."""
        content = train.content() or {"digest": self.points or metrics.digest(train)}
        known = read(self.folder / "data.json")
        if known and known != content:
            stop(f"{self.folder} was made with other data than {self.data} has now: move it away, "
                 "or give other --minutes")
        keep(self.folder / "data.json", content)

    def run(self, name):
        return self.folder / name

    def steps(self, name):
        """The step counts of a method that are judged, from few to many."""
        return [k for k in METHODS[name].steps if self.full or k in SHORT]

    def shown(self, name):
        """The step count that a method is shown with, where there is time for it."""
        return METHODS[name].shown if self.full else min(METHODS[name].shown, SHORT[-1])

    # --------------------------------------------------------------------------------- training
    def network(self):
        """The U-Net's flags: those of the first run that there is, and at first none."""
        names = [field.name for field in dataclasses.fields(flags.Unet)
                 if not (self.points and field.metadata["of_pictures"])]
        for name in METHODS:
            settings = read(self.run(name) / "config.json")
            if settings:
                attends = bool(settings.get("attention"))
                result = []
                for field in names:
                    value = settings[field]
                    if field != "heads" or attends:
                        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                        result += [f"--{field}", text]
                return result
        return []

    def training(self, script, run, minutes):
        """The command that trains a script, or goes on with it, but for the method's flags."""
        size = ["--size", self.size] if self.size else []
        return [SCRIPTS / script, "--train", "--data", self.data, "--data-root", self.root, *size,
                "--run", run, "--minutes", f"{minutes:g}", "--iters", "1000000", *self.network()]

    def shares(self, name):
        """ddgan.py's --pretrain and --decay, by the updates that fit; of others nothing.

        Its recipes count updates, and for fewer minutes least squares would take all of them.
        """
        if METHODS[name].script != "ddgan.py":
            return []
        begun = read(self.run(name) / "config.json")
        if begun:
            return ["--pretrain", begun["pretrain"], "--decay", begun["decay"]]
        kept = read(self.folder / "pace.json")
        if not kept:
            _, recipe = self.trial(TRIAL / 100)
            minutes = max(TRIAL, min(LONGER, self.minutes / 30))
            each, _ = self.trial(minutes, "--pretrain", "0")
            kept = {"seconds": each, "pretrain": recipe["pretrain"], "decay": recipe["decay"]}
            keep(self.folder / "pace.json", kept)
        fit = int(60 * 0.95 * self.minutes / kept["seconds"])  # a twentieth is for sheets
        result = []
        if name == "ddgan" and kept["pretrain"] > LEAST_SQUARES * fit:
            result = ["--pretrain", int(LEAST_SQUARES * fit)]
        return result + (["--decay", fit] if kept["decay"] else [])

    def trial(self, minutes, *more):
        """Seconds that an update of ddgan.py takes after the first ten, and its settings.

        It is the median of every ten: a moment's other work on the machine does not count.
        """
        run = self.folder / "trial"
        start(*self.training("ddgan.py", run, minutes), "--fresh", "--T", "4", *more, quiet=True)
        settings, rows = read(run / "config.json"), []
        if (run / "metrics.csv").exists():
            rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
        shutil.rmtree(run)
        if len(rows) < 2:  # a slow machine
            return 60 * minutes / max(1, int(rows[-1]["step"]) if rows else 1), settings
        times = [(float(row["seconds"]), int(row["step"])) for row in rows]
        paces = [(b - a) / (j - i) for (a, i), (b, j) in zip(times, times[1:])]
        return median(paces), settings

    def trained(self, name):
        """Whether a method has been trained to its end here."""
        kept = read(self.run(name) / "trained.json")
        path = self.run(name) / "checkpoint.pt"
        return path.exists() and kept.get("checkpoint") == identity(path)

    def compare(self, name):
        """Say where a script is another one than trained the run here."""
        run, script = self.run(name), METHODS[name].script
        with inputs():
            old = (run / "script.py").read_text(encoding="utf-8")
        if differs(old, (SCRIPTS / script).read_text(encoding="utf-8")):
            print(f"{script} has changed since {run} was trained: without this folder it is "
                  "trained anew", file=sys.stderr)

    def train(self, name):
        """Train a method, or finish its training."""
        method, run = METHODS[name], self.run(name)
        more = [*method.flags, *([] if self.points else method.of_pictures)]
        start(*self.training(method.script, run, self.minutes), *more, *self.shares(name))
        keep(run / "trained.json", {"checkpoint": identity(run / "checkpoint.pt"),
                                    "date": datetime.date.today().isoformat(),
                                    "machine": machine(), "versions": versions()})

    # ---------------------------------------------------------------------------------- judging
    def judge(self, name):
        """Sample with each step count and seed that there is time for, and judge what comes.

        The fewest steps, which tell the pace, those that are shown, the others; then bits/dim and
        more seeds. What would take too long is left out, with a word.
        """
        steps, shown = self.steps(name), self.shown(name)
        order = sorted(steps, key=lambda k: (k != steps[0], k != shown, k))
        todo = [(k, 0) for k in order]
        if METHODS[name].bits and not self.points:
            todo.append(("bits", 0))
        if self.full:
            todo += [(k, seed) for seed in range(1, SEEDS) for k in steps if k <= MANY]
        now = identity(self.run(name) / "checkpoint.pt")
        spent = each = around = 0.0  # seconds: so far, of a sample's evaluation, of a start
        for k, seed in todo:
            path = self.judged(name, k, seed)
            kept = read(path)
            if kept.get("checkpoint") != now:
                evaluations = 8500 if k == "bits" else k * self.n  # of 500 pictures, 17 each
                needs = each * evaluations + around
                left = max(0, 60 * JUDGING * self.minutes - spent)
                if needs > left:
                    print(f"{name}: {k} {'' if k == 'bits' else 'steps '}of seed {seed}: left "
                          f"out, since it would take {needs:.0f} s, and {left:.0f} are left")
                    continue
                began = time.perf_counter()
                try:
                    kept = self.bits(name) if k == "bits" else self.point(name, k, seed)
                except Failed as what:
                    print(f"{name}, {k} steps, seed {seed}: {what}", file=sys.stderr)
                    self.failed = True
                    continue
                kept |= {"checkpoint": now, "seconds": time.perf_counter() - began}
                keep(path, kept)
            spent += kept["seconds"]
            if k != "bits":
                each = kept["ms"] / 1000 / k
                around = max(0, kept["seconds"] - each * k * self.n)

    failed = False  # whether some point could not be judged

    def judged(self, name, k, seed):
        """The file of one judgement."""
        return self.run(name) / "judged" / f"{k}-{seed}-{self.n}.json"

    def point(self, name, k, seed):
        """Samples by a process that does nothing else, and what is to be said of them: a dict."""
        import numpy
        run, script = self.run(name), SCRIPTS / METHODS[name].script
        out = run / "judged" / "samples.npz"
        print(f"{name}: {self.n} samples, {k} steps, seed {seed}", flush=True)
        told = start(script, "--sample", "--data", self.data, "--data-root", self.root, "--run",
                     run, "--n", self.n, "--steps", k, "--seed", seed, "--out", out)
        found = re.search(r"(\d+) network evaluations each, (\S+) ms per sample", told)
        with inputs():
            with numpy.load(out) as arrays:
                x = torch.from_numpy(arrays["arr_0"])
            out.unlink()
            x = x if self.points else x.permute(0, 3, 1, 2).contiguous()
            result = metrics.evaluate(x, self.data, self.root, self.size, device=self.device)
            if seed == 0:
                with written(run / "judged" / f"{k}.png") as file:
                    sheet = scatter(x) if self.points else grid(x[:STRIP], 4)
                    sheet.save(file, format="PNG")
        return result | {"evaluations": int(found[1]), "ms": float(found[2]), "seed": seed}

    def bits(self, name):
        """What the script's own --evaluate says of bits/dim: a dict."""
        print(f"{name}: bits/dim", flush=True)
        start(SCRIPTS / METHODS[name].script, "--evaluate", "--data", self.data, "--data-root",
              self.root, "--run", self.run(name), "--steps", 1, "--n", 6)
        path = self.run(name) / "evaluation.json"
        result = {key: value for key, value in read(path).items() if "bits" in key}
        path.unlink()  # of six samples
        shutil.rmtree(self.run(name) / "evaluations", ignore_errors=True)
        return result

    # --------------------------------------------------------------------------------- the result
    def figures(self, name):
        """Of a trained method: parameters, updates, training images a second, bits/dim.

        Of ldm.py those of both stages.
        """
        run, method = self.run(name), METHODS[name].script.removesuffix(".py")
        updates = images = seconds = 0
        for path in (run / "autoencoder" / "checkpoint.pt", run / "checkpoint.pt"):
            if path.exists():
                with inputs():
                    saved = load_checkpoint(path, (method,))
                updates += saved["step"]
                images += saved["step"] * saved["config"]["batch"]
                seconds += saved["seconds"]
        weights = saved["ema"]["net"].values()
        result = {"parameters": sum(w.numel() for w in weights if w.is_floating_point()),
                  "updates": updates, "images/s": round(images / max(seconds, 1e-9), 1)}
        bits = read(self.judged(name, "bits", 0))
        return result | {key: bits[key] for key in ("bits/dim",) if key in bits}

    def result(self):
        """All there is to say, for trilemma.json: {"about": ..., "rows": [...]}.

        It has all methods that were trained here, whichever were asked for now.
        """
        rows, machines, dates = [], {}, []
        for name in METHODS:
            if not self.trained(name):
                continue
            about = read(self.run(name) / "trained.json")
            found = {}
            for k in self.steps(name):
                judged = [read(self.judged(name, k, seed)) for seed in range(SEEDS)]
                judged = [j for j in judged if j.get("checkpoint") == about["checkpoint"]]
                if judged:
                    found[k] = judged
            if not found:
                continue
            machines[f"{about['machine']}, {about['versions']}"] = True
            dates.append(about["date"])
            shown = self.shown(name) if self.shown(name) in found else max(found)
            figures = self.figures(name)
            for k, judged in found.items():
                row = {"method": name, "script": METHODS[name].script, "shown": k == shown,
                       "evaluations": judged[0]["evaluations"]}
                for key in ("fcd", "fcd_floor", "wasserstein", "wasserstein_floor", "precision",
                            "recall", "coverage", "modes", "ms"):
                    if key in judged[0]:
                        row[key] = [round(j[key], 6) for j in judged]
                rows.append(row | figures)
        about = {"data": data.title(self.data), "minutes": self.minutes, "samples": self.n,
                 "machine": "; ".join(machines), "network": shlex.join(self.network()),
                 "date": " to ".join(sorted({min(dates), max(dates)})) if dates else ""}
        return {"about": about, "rows": rows}

    def sheet(self, row):
        """The file with the first samples of a row."""
        return self.run(row["method"]) / "judged" / f"{row['evaluations']}.png"


def machine():
    """The processor that computes, and how many cores there are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def versions():
    """Of what computes."""
    return f"PyTorch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]}"


# --------------------------------------------------------------------------------------- the table
def distance(row):
    """The name of a row's distance: fcd of pictures, wasserstein of points."""
    return "fcd" if "fcd" in row else "wasserstein"


def number(x):
    """Three digits of it, as short as they go."""
    if x >= 100:
        return f"{x:,.0f}"
    if x >= 1:
        return f"{x:.3g}"
    return f"{x:.2f}" if x >= 0.1 or x == 0 else f"{x:.2g}"


def spread(values):
    """The mean of the seeds, and from where to where they go."""
    text = number(mean(values))
    if len(values) == 1:
        return text
    return f"{text} ({number(min(values))}–{number(max(values))})"


def ties(rows):
    """For each number of evaluations, in words, who has the smallest distance, and who ties.

    Whose range over the seeds meets the best one's is not told from it; one seed has no range.
    """
    said = []
    for k in sorted({row["evaluations"] for row in rows}):
        there = [row for row in rows if row["evaluations"] == k]
        if len(there) < 2:
            continue
        there.sort(key=lambda row: mean(row[distance(row)]))
        best = there[0]
        top = best[distance(best)]
        if len(top) < 2:
            said.append(f"{k}: {best['method']} has the smallest, by one seed, which calls no tie")
            continue
        equal = [row["method"] for row in there[1:] if min(row[distance(row)]) <= max(top)]
        tied = f", a tie with {' and '.join(equal)}" if equal else ""
        said.append(f"{k}: {best['method']}{tied}")
    return said


def aligned(head, lines):
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |"
                     for cells in (head, ["---"] * len(head), *lines))


def short(result, links=""):
    """The table of one line a method, as README shows it. links: what stands before a script."""
    lines = []
    for row in result["rows"]:
        if row["shown"]:
            method = METHODS[row["method"]]
            flags = f" `{' '.join(method.flags)}`" if row["method"] == "gan" else ""
            lines.append((f"[`{row['script']}`]({links}{row['script']}){flags}",
                          f"[{method.paper}](https://arxiv.org/abs/{method.arxiv})",
                          row["evaluations"], spread(row[distance(row)]),
                          f"{mean(row['recall']):.2f}", number(mean(row["ms"]))))
    name, floor = "FCD", 0.0
    if result["rows"]:
        first = result["rows"][0]
        name = "FCD" if distance(first) == "fcd" else "Wasserstein"
        floor = mean(first[distance(first) + "_floor"])
    return aligned(("script", "paper", "evaluations", f"{name} (floor {number(floor)})", "recall",
                    "ms a sample"), lines)


def report(result, links=""):
    """trilemma.md; links: what stands before a script."""
    about, rows = result["about"], result["rows"]
    last = "modes" if any("modes" in row for row in rows) else "coverage"
    what = "FCD" if rows and distance(rows[0]) == "fcd" else "Wasserstein"
    lines = []
    for row in rows:
        lines.append((
            row["method"], row["evaluations"], spread(row[distance(row)]),
            f"{mean(row['precision']):.2f}", f"{mean(row['recall']):.2f}",
            number(mean(row[last])), number(mean(row["ms"])), f"{row['images/s']:.0f}",
            f"{row['updates']:,}", f"{row['parameters'] / 1e6:.2f} M",
            f"{row['bits/dim']:.2f}" if "bits/dim" in row else ""))
    floor = number(mean(rows[0][distance(rows[0]) + "_floor"])) if rows else ""
    minutes = f"{about['minutes']:g} minute{'s' * (about['minutes'] != 1)}"
    text = [f"# The trilemma on {about['data']}, {minutes} a method", "",
            f"{about['date']}; {about['machine']}. U-Net {about['network']}. {about['samples']:,} "
            f"samples for each seed; the mean, and in brackets the range, of as many as three "
            "seeds of sampling, of one training run each.", "", short(result, links), "",
            "All of it:", "",
            aligned(("method", "evaluations", f"{what} (floor {floor})", "precision", "recall",
                     last, "ms a sample", "images/s in training", "updates", "parameters",
                     "bits/dim"), lines), "",
            f"The smallest {what} by evaluations; where ranges over the seeds meet, a tie:", "",
            *(f"- {line}" for line in ties(rows)), ""]
    if last == "modes":
        n = about["samples"]
        text += [f"{n:,} real ones, each mode as likely, would show "
                 f"{1000 * (1 - (1 - 1 / 1000) ** n):.0f} of the 1,000 modes.", ""]
    return "\n".join(text)


# ------------------------------------------------------------------------------------ the pictures
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#000000")


def picture(result, path):
    """Quality against the time of a sample, both logarithmic; recall is the size of a mark."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    rows, about = result["rows"], result["about"]
    what = distance(rows[0])
    floor = mean(rows[0][what + "_floor"])
    values = [mean(row[what]) for row in rows]
    bottom = min(floor, *values) / 2
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.axhspan(bottom, floor, color="#dddddd")
    axes.text(0.99, floor, "as near as real ones are to each other ", ha="right", va="top",
              fontsize=9, color="#555555", transform=axes.get_yaxis_transform())
    for colour, name in zip(COLOURS, METHODS):
        mine = [row for row in rows if row["method"] == name]
        if not mine:
            continue
        ms = [mean(row["ms"]) for row in mine]
        y = [mean(row[what]) for row in mine]
        axes.plot(ms, y, color=colour, linewidth=1.5, alpha=0.6)
        axes.scatter(ms, y, s=[mark(mean(row["recall"])) for row in mine], color=colour,
                     edgecolors="white", zorder=3)
        axes.plot([], [], "o", color=colour, label=name)  # for the legend
        for row, a, b in zip(mine, ms, y):
            axes.plot([a, a], [min(row[what]), max(row[what])], color=colour, linewidth=1)
            axes.annotate(str(row["evaluations"]), (a, b), textcoords="offset points",
                          xytext=(0, 10), ha="center", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", ylim=(bottom, max(values) * 1.6),
             xlabel="milliseconds a sample: left is faster",
             ylabel=f"{'FCD' if what == 'fcd' else 'Wasserstein distance'}: low is better")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.add_artist(axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9))
    marks = [axes.scatter([], [], s=mark(recall), color="#888888", label=f"{recall:g}")
             for recall in (0.25, 0.5, 0.75, 1)]
    axes.legend(handles=marks, title="recall:\nlarge is diverse", loc="lower left", fontsize=9,
                bbox_to_anchor=(1.01, 0), labelspacing=1)
    minutes = f"{about['minutes']:g} minute{'s' * (about['minutes'] != 1)}"
    axes.set_title(f"{about['data']}, {minutes} of training each; the numbers are network "
                   "evaluations a sample", fontsize=10)
    with written(path) as file:
        figure.savefig(file, format="png")


def mark(recall):
    """A mark's area, in points squared."""
    return 15 + 285 * recall ** 2


def strip(result, sheet, path):
    """The same number of samples by each method, with evaluations and milliseconds below.

    sheet: of a row, the file of its samples.
    """
    from PIL import Image
    from matplotlib.figure import Figure
    rows = [row for row in result["rows"] if row["shown"]]
    figure = Figure(figsize=(1.7 * len(rows), 2), dpi=100, layout="constrained")
    for row, axes in zip(rows, figure.subplots(1, len(rows), squeeze=False).flat):
        if sheet(row).exists():
            with Image.open(sheet(row)) as image:
                axes.imshow(image.convert("RGB"))
        axes.set_axis_off()
        axes.set_title(row["method"], fontsize=10)
        many = row["evaluations"]
        axes.text(0.5, -0.05, f"{many} evaluation{'s' * (many > 1)}\n"
                  f"{number(mean(row['ms']))} ms", ha="center", va="top", fontsize=9,
                  transform=axes.transAxes)
    with written(path) as file:
        figure.savefig(file, format="png")


# --------------------------------------------------------------------------------------------- main
def parse(arguments=None):
    """The flags, checked."""
    parser = argparse.ArgumentParser("trilemma", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a data set's name, or a path of pictures")
    parser.add_argument("--data-root", default="data", help="where data sets are kept")
    parser.add_argument("--minutes", type=float, default=FULL, help="of training, for each method; "
                        f"default {FULL:g}, below which there is one seed and a shorter grid")
    parser.add_argument("--methods", default=",".join(METHODS), help="by default all: "
                        + ", ".join(METHODS))
    parser.add_argument("--n", type=int, default=0, help="samples for each judgement; default "
                        f"1000, below {FULL:g} minutes 500")
    parser.add_argument("--out", default="", help="folder of the table and the pictures; default "
                        "that of the runs")
    parser.error = stop
    flags.dashed(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(arguments)
    names = [name for name in given.methods.split(",") if name]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        stop(f"--methods {given.methods!r}: give some of {', '.join(METHODS)}")
    if not 0 < given.minutes < math.inf:
        stop(f"--minutes {given.minutes:g}: give more than 0, and a finite number")
    if given.n < 0 or 0 < given.n < 6:
        stop(f"--n {given.n}: at least 6 samples can be judged")
    given.methods = [name for name in METHODS if name in names]
    return given


def main(arguments=None):
    """The command; ends with exit status 1 where something could not be judged."""
    files.program = "trilemma"
    given = parse(arguments)
    for s in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(s) is not signal.SIG_IGN:
            signal.signal(s, signal.default_int_handler)
    early.choose()  # once for all that is compared
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    try:
        contest = Contest(given)
        out = Path(given.out or contest.folder)
        with inputs():
            out.mkdir(parents=True, exist_ok=True)  # a wrong one is told now, not in the end
        failed = held(contest, given)
        shown(contest, out)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(1 if failed or contest.failed else 0)


def held(contest, given):
    """Train and judge all methods; the names of those that failed."""
    for name in given.methods:
        if name not in contest.names:
            print(f"{name} is for pictures: left out")
    left = [name for name in contest.names if not contest.trained(name)]
    what = f"{contest.folder}: {len(contest.names) - len(left)} of {len(contest.names)} trained"
    if left:
        what += (f"; {contest.minutes:g} minutes for each of the others and at most as long to "
                 f"judge them, {2 * contest.minutes * len(left):.0f} minutes in all")
    print(what, flush=True)
    failed = []
    for i, name in enumerate(contest.names, 1):
        try:
            if contest.trained(name):
                contest.compare(name)
            else:
                print(f"[{i}/{len(contest.names)}] {name}: minutes of training: "
                      f"{contest.minutes:g}", flush=True)
                contest.train(name)
            contest.judge(name)
        except Failed as what:
            print(f"{name} is left out: {what}", file=sys.stderr)
            failed.append(name)
    return failed


def shown(contest, out):
    """Write the table and the pictures into the folder `out`, and print the short table."""
    result = contest.result()
    if not result["rows"]:
        stop("nothing could be judged")
    keep(out / "trilemma.json", result)
    links = os.path.relpath(SCRIPTS, out).replace(os.sep, "/") + "/"
    with inputs():
        with written(out / "trilemma.md") as file:
            file.write_text(report(result, links), encoding="utf-8")
        picture(result, out / "trilemma.png")
        strip(result, contest.sheet, out / "strip.png")
    print(f"\n{short(result)}\n\n{out}: trilemma.md, trilemma.json, trilemma.png, strip.png")


if __name__ == "__main__":
    main()
