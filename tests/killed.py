"""Train a script, end it twice by SIGKILL at a random moment, and let the third start finish it.

    python killed.py FOLDER ddpm

conftest.py starts this beside the tests, and test_scripts.py looks at FOLDER/killed-ddpm.
"""
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ITERS, SMALL, start

# a checkpoint with each row, and sheets, which the run that was never killed has not
OFTEN = "from common import runs; runs.SAVE_EVERY = -1; runs.FIRST_SHEET, runs.SHARE = 0.1, 1"


def rows(run):
    """How many rows metrics.csv has."""
    path = run / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


if __name__ == "__main__":
    folder, script = Path(sys.argv[1]), sys.argv[2]
    run = folder / f"killed-{script}"
    given = [script, "--train", "--iters", ITERS[script], *SMALL[script], "--device", "cpu",
             "--run", run]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # of a method in two stages one is killed in each
    for folder_of_rows in (run / "autoencoder" if script == "ldm" else run, run):
        before = rows(folder_of_rows)
        process = start(folder, *given, before=OFTEN, **quiet)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None \
                and rows(folder_of_rows) < before + 2:
            time.sleep(0.01)
        time.sleep(random.random() * 0.1)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder_of_rows / "checkpoint.pt").exists()
        assert 1 < rows(folder_of_rows) < int(ITERS[script]) / 10
    assert start(folder, *given, before=OFTEN, **quiet).wait() == 0
    assert list((run / "sheets").glob("*.png"))
