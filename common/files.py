"""Errors of one line, files that are whole or not there at all, and checkpoints as they are read.

It knows neither flags nor runs nor networks.
"""
import contextlib
import os
import sys
from pathlib import Path

import torch

from common.processes import rank

program = ""  # the script's name, set by flags.parse; without one, from Python, errors are raised


def stop(message):
    """End the program with exit status 2 and one line on stderr; from Python raise a ValueError."""
    message = " ".join(str(message).split())
    if not program:
        raise ValueError(message)
    if rank() == 0:
        print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def excepthook(kind, error, trace):
    """Python's, but of memory that was not there it says in one line what to do: exit status 2."""
    words = str(error)
    short = issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or \
        issubclass(kind, RuntimeError) and any(said in words for said in (
            "allocate memory", "not enough memory", "out of memory"))
    if not short:
        return sys.__excepthook__(kind, error, trace)
    print(f"{program}: error: there is not enough memory: give a smaller --size or --batch, or "
          "fewer --n", file=sys.stderr)  # whichever rank it is
    sys.stdout.flush()
    os._exit(2)


@contextlib.contextmanager
def inputs():
    """Around what reads the user's files, pictures, checkpoints: a ValueError or OSError stops."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not program:
            raise
        stop(error)


@contextlib.contextmanager
def written(path):
    """A temporary path beside `path` that takes its name when all went well, flushed to disk.

    When not, it vanishes, and what was under the name stays. OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        raise OSError(f"{path} cannot be written: {fault}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, methods, otherwise="train first (--train), or give --checkpoint FILE"):
    """The dict that Run.save wrote, on the CPU; executes nothing from the file.

    ValueError where there is none (otherwise: what to do then), it is damaged, or of another script
    than `methods`.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        method, data, _ = saved["method"], saved["data"], saved["step"] + 1
        if len(data["shape"]) not in (1, 3):
            raise ValueError("shape")
        if not all(isinstance(n, int) and n > 0 for n in data["shape"]):
            raise ValueError("shape")
        words, longest = data.get("vocabulary", []), data.get("longest", 0)
        if not all(isinstance(word, str) for word in words) or not 0 <= longest < 1 << 20:
            raise ValueError("words")
        data | saved["config"] | dict(classes=sorted(data["classes"]))  # all of them what they seem
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: {otherwise}") from None
    except Exception:  # a damaged or foreign file raises anything
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged") from None
    if method not in methods:
        raise ValueError(f"{path} is a checkpoint of {method}.py, which {methods[0]}.py cannot use")
    return saved
