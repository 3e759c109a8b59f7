"""What is due before PyTorch is imported: an end by Ctrl-C, and how busy the cores are.

A script imports this first, since PyTorch takes seconds. From then on Ctrl-C ends it without a
traceback, and the time that passes until it computes shows how many cores other programs use.
PyTorch's threads wait for each other at every layer: one too many beside a busy program can make an
update ten times as slow.

It knows nothing of ours.
"""
import math
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _ours():
    """Whether the program is one of this project's own: no notebook, no test."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent in (ROOT, ROOT / "common")


def _leave(number, frame):
    """End the program at once, while it imports: then nothing is begun that could be lost."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if _ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)  # until flags.parse sets its own


# ------------------------------------------------------------------------------------ busy cores
def _cores():
    """The cores that this process may use, a set; None where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _busy():
    """Seconds that all programs have worked on these cores since the machine began, or None."""
    try:
        mine, ticks = _cores(), 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *numbers = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in mine:
                user, nice, system, _, _, irq, softirq, stolen = map(int, numbers[:8])
                ticks += user + nice + system + irq + softirq + stolen
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, TypeError, ValueError):  # not Linux
        return None


def _now():
    return time.monotonic(), _busy(), time.process_time()


_began = _now()
_chosen = {}  # of choose(): PyTorch's own number of threads, and the cores that others used


def others():
    """How many cores other programs have kept busy of late; 0.0 where no one counts.

    That is since this was imported, or in half a second now where that is too long ago or too
    short: the system counts in hundredths of a second.
    """
    then, busy, own = _began if time.monotonic() - _began[0] < 20 else _now()
    if busy is None:
        return 0.0
    time.sleep(max(0, 0.5 - (time.monotonic() - then)))
    now, busy_now, own_now = _now()
    return max(0.0, (busy_now - busy - (own_now - own)) / (now - then))


def choose():
    """Let PyTorch compute with as many threads as there are cores that nothing else uses.

    Never with more than it would take by itself, and with as many as OMP_NUM_THREADS says.
    """
    import torch
    if "OMP_NUM_THREADS" in os.environ or _cores() is None:
        return
    if _chosen.setdefault("most", torch.get_num_threads()) == 1:
        return
    _chosen["others"] = others()
    free = math.floor(len(_cores()) - _chosen["others"] + 0.5)
    torch.set_num_threads(max(1, min(_chosen["most"], free)))


def restore(threads):
    """Compute with as many threads as a run began with, so that it goes on bit for bit.

    Returns what to say where that cannot be, or another number may be faster now; else "".
    """
    import torch
    free, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    there = len(_cores() or ()) or os.cpu_count()
    if threads == free:
        return ""
    if asked or threads > there:
        why = f"OMP_NUM_THREADS is {asked}" if asked else f"there are {there} cores"
        return f"began with {counted(threads)}, and {why}: it goes on, though not bit for bit as " \
               "it would have"
    torch.set_num_threads(threads)
    return f"computes with {counted(threads)}, as it began; OMP_NUM_THREADS={free} before the " \
           "command may be faster now, and is not bit for bit the same"


def counted(threads):
    """As words."""
    return f"{threads} thread{'s' * (threads != 1)}"


def told():
    """How many threads compute, in words, and why not more."""
    import torch
    threads, most = torch.get_num_threads(), _chosen.get("most", 0)
    if threads >= most:
        return f"computes with {counted(threads)}"
    busy = f"other programs keep {_chosen['others']:.1f} cores busy"
    return f"computes with {threads} of {most} threads, since {busy}; OMP_NUM_THREADS={most} " \
           "before the command takes all"
