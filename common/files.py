"""Errors of one line, files that are whole or not there at all, and checkpoints as they are read.

Also the lock that keeps a folder for one process. It knows neither flags nor runs nor networks.
"""
import contextlib
import functools
import math
import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import torch

from common.processes import rank

MOST = 1 << 53  # up to which floats count
OTHERS_WAIT = 3.0  # seconds, in which rank 0 may speak for all
program = ""  # the script's name, set by flags.parse; without one, from Python, errors are raised


def stop(message):
    """End the program with exit status 2 and one line on stderr; from Python raise a ValueError."""
    message = " ".join(str(message).split())
    unlock()
    if not program:
        raise ValueError(message)
    if rank() > 0:
        time.sleep(OTHERS_WAIT)  # where rank 0 says the same, torchrun ends this one meanwhile
        message = f"process {rank()}: {message}"
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def excepthook(kind, error, trace):
    """Python's, but of memory that was not there it says in one line what to do: exit status 2."""
    words = str(error)
    short = issubclass(kind, (MemoryError, torch.OutOfMemoryError)) or \
        issubclass(kind, RuntimeError) and any(said in words for said in (
            "allocate memory", "not enough memory", "out of memory", "calculation overflowed",
            "Overflow when unpacking", "multiplication overflow", "Invalid buffer size"))
    if not short:
        return sys.__excepthook__(kind, error, trace)
    print(f"{program}: error: there is not enough memory: give a smaller --width, --size or "
          "--batch, or fewer --n", file=sys.stderr)  # whichever rank it is
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


# ------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def naming(path):
    """Around writing: an OSError says what could not be written."""
    try:
        yield
    except OSError as fault:
        raise OSError(f"{path} cannot be written: {fault}") from None


@contextlib.contextmanager
def written(path):
    """A temporary path beside `path` that takes its name when all went well, flushed to disk.

    When not, it vanishes, and what was under the name stays. OSError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # an error here would hide the one that counts
                temporary.unlink()


def save_tensors(path, what):
    """torch.save, all or nothing. OSError where it cannot be written."""
    with written(path) as file:
        try:
            torch.save(what, file)
        except RuntimeError as fault:  # PyTorch's word for a full disk
            if "CUDA" in str(fault):
                raise
            raise OSError(fault) from None


_locks = {}  # path: the open file that holds it


def lock(folder):
    """Keep other processes from training in a folder until `unlock`, or until this one ends.

    ValueError where another one trains there. It is the system's lock on an empty file that stays:
    who is killed leaves no lock behind, and forked children hold none. One folder at a time.
    """
    path = Path(os.path.realpath(folder)) / ".lock"
    if path in _locks:
        return
    unlock()
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"another process trains in {folder}: wait for it, or give another "
                         "--run") from None
    except OSError as fault:  # a file system without locks
        print(f"{folder} cannot be locked ({fault}): let only one process train in it",
              file=sys.stderr)
    _locks[path] = file


def unlock():
    """Let other processes train where `lock` kept them out; no folder stays that holds nothing."""
    for path in list(_locks):
        file = _locks.pop(path)
        with contextlib.suppress(OSError):
            if os.listdir(path.parent) == [path.name]:
                path.unlink()
                path.parent.rmdir()
        file.close()


# ------------------------------------------------------------------------------------------ reading
def unpickled(path):
    """What torch.save wrote into a file, on the CPU. Executes nothing from the file.

    Its checksums are compared, which PyTorch does not look at. FileNotFoundError where there is
    nothing; any other exception for what is no such file, or damaged.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("no file")  # a pipe would be waited for
    _whole(os.fspath(path), about.st_size, about.st_mtime_ns)
    return torch.load(path, map_location="cpu", weights_only=True)


@functools.lru_cache(maxsize=16)  # one command may read its checkpoint five times
def _whole(path, size, changed):
    """ValueError for a zip of which a part is damaged, there twice, or larger than it looks."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if len({part.filename for part in parts}) < len(parts):
            raise ValueError("two parts of one name")  # of which PyTorch may read the other one
        # PyTorch packs nothing: what is packed may unpack to more than there is memory
        if any(part.compress_type for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("packed")
        if archive.testzip():
            raise ValueError("damaged")


def _check(saved):
    """ValueError where something beside the weights is not of the kind that Run.save writes.

    Nothing in a file is believed: numbers have bounds, and lists hold no lists, of which a small
    file can hold so many that to print them takes for ever.
    """
    config, data = dict(saved["config"]), dict(saved["data"])
    content = dict(data.pop("content", None) or {})
    shape = data["shape"]
    texts = [saved["method"], saved["source"], saved.get("script", ""), data["data"],
             *data["classes"], *data.get("chosen", ()), *data.get("vocabulary", ()),
             *config, *data, *content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("texts")
    whole = [saved["step"], *shape, data.get("longest", 0), data.get("pictures", 0),
             saved.get("threads", 0)]
    if not all(type(n) is int and 0 <= n < MOST for n in whole):
        raise ValueError("whole numbers")
    if len(shape) not in (1, 3) or 0 in shape:
        raise ValueError("shape")
    if data.get("longest", 0) >= 1 << 20 or saved.get("threads", 0) >= 1 << 16:
        raise ValueError("words, threads")
    if type(saved["seconds"]) not in (int, float) or not 0 <= saved["seconds"] < math.inf:
        raise ValueError("seconds")
    for value in (*config.values(), *data.values(), *content.values()):
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(part, (int, float, str, type(None))):
                raise ValueError("nesting")
            if isinstance(part, int) and abs(part) >> 127:
                raise ValueError("an absurd number")


_kept = {}  # path, size, time of change -> the checkpoint that was read for its settings


def load_checkpoint(path, methods, otherwise="train first (--train), or give --checkpoint FILE",
                    keep=False):
    """The dict that Run.save wrote, on the CPU; executes nothing from the file.

    keep: of who reads the settings alone. The next who asks for a checkpoint gets this dict, if it
    is of the same file, which is not read twice then. ValueError where there is none (otherwise:
    what to do then), it is damaged, or of another script than `methods`.
    """
    try:
        about = os.stat(path)
        file = os.path.abspath(path), about.st_size, about.st_mtime_ns
        saved = _kept.pop(file, None)
        _kept.clear()
        if saved is None:
            saved = unpickled(path)
            _check(saved)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: {otherwise}") from None
    except PermissionError as fault:
        raise ValueError(f"{path} cannot be read: {fault.strerror}") from None
    except MemoryError:
        raise
    except Exception:  # a damaged or foreign file raises anything
        raise ValueError(f"{path} is not a checkpoint of this project, or is damaged") from None
    if saved["method"] not in methods:
        raise ValueError(f"{path} is a checkpoint of {saved['method']}.py, which {methods[0]}.py "
                         "cannot use")
    if keep:
        _kept[file] = saved
    return saved
