"""Errors of one line, and files that are whole or not there at all.

It knows neither flags nor runs nor networks.
"""
import contextlib
import os
import sys
from pathlib import Path

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
