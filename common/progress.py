"""How far long work has got: a bar on a terminal, and lines, seldom, in a file or a pipe.

It knows nothing of ours.
"""
import contextlib
import sys


class Lines:
    """A file in place of sys.stderr: each state of a bar as a line of its own."""
    encoding = "utf-8"

    def write(self, text):
        text = text.replace("\r", "").replace("\x1b[A", "").strip()
        with contextlib.suppress(OSError):  # who read it may be gone
            if text:
                sys.stderr.write(text + "\n")

    def flush(self):
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def progress(things=None, text="", leave=False, **more):
    """tqdm over things, or up to total= by update(), with text before it; more is tqdm's.

    Where stderr is no terminal it writes a line every ten seconds, and none of what is done by
    then, unless it is left there.
    """
    from tqdm import tqdm
    if sys.stderr.isatty():
        return tqdm(things, text, leave=leave, mininterval=0.2, dynamic_ncols=True, **more)
    return tqdm(things, text, leave=leave, mininterval=10, delay=0 if leave else 10, file=Lines(),
                **more)
