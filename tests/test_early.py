"""common/early.py: how many threads, by what other programs use; and an early Ctrl-C."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import early
from conftest import ROOT


@pytest.mark.parametrize("cores,busy,most,threads", [
    (8, 3.0, 8, 5), (2, 1.0, 2, 1), (2, 0.3, 2, 2), (2, 0.5, 2, 2), (2, 0.6, 2, 1), (2, 2.0, 2, 1),
    (16, 3.0, 8, 8),  # PyTorch takes a thread for two cores that are one
    (8, None, 8, 8)])
def test_threads_are_the_cores_less_what_others_use(cores, busy, most, threads, monkeypatch):
    """Of 10 seconds, in 4 of which this process worked too."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(early, "_cores", lambda: {*range(cores)})
    now = None if busy is None else 100 + 10 * busy + 4
    monkeypatch.setattr(early, "_busy", lambda: now)
    monkeypatch.setattr(early, "_began", (5.0, None if busy is None else 100.0, 1.0))
    monkeypatch.setattr(early.time, "monotonic", lambda: 15.0)
    monkeypatch.setattr(early.time, "process_time", lambda: 5.0)
    monkeypatch.setattr(early, "_chosen", {})
    torch.set_num_threads(most)
    early.choose()
    assert torch.get_num_threads() == threads
    said = early.told()
    if threads < most:
        assert said == f"computes with {threads} of {most} threads, since other programs keep " \
            f"{busy:.1f} cores busy; OMP_NUM_THREADS={most} before the command takes all"
    else:
        assert said == f"computes with {threads} threads"


def test_what_the_user_says_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(early, "others", lambda: pytest.fail("nothing is asked"))
    torch.set_num_threads(2)
    early.choose()
    assert torch.get_num_threads() == 2
    assert early.restore(2) == ""
    assert early.restore(1).startswith("began with 1 thread, and OMP_NUM_THREADS is 2: it goes on")
    assert torch.get_num_threads() == 2


def test_a_run_from_a_larger_machine_goes_on_with_a_word(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores in ({0, 1}, None):
        monkeypatch.setattr(early, "_cores", lambda: cores)
        monkeypatch.setattr(early.os, "cpu_count", lambda: 2)
        assert early.restore(64).startswith("began with 64 threads, and there are 2 cores: it goes")
        assert torch.get_num_threads() == 1
        assert early.restore(2) == "computes with 2 threads, as it began; OMP_NUM_THREADS=1 " \
            "before the command may be faster now, and is not bit for bit the same"
        torch.set_num_threads(1)


def test_what_was_long_ago_is_not_asked(monkeypatch):
    """A notebook may be hours old: then half a second counts, in which a core was busy."""
    clock, spent = [9000.0], [0.0]

    def sleep(seconds):
        clock[0] += seconds
        spent[0] += seconds
    monkeypatch.setattr(early, "_began", (1.0, 7.0, 0.0))
    monkeypatch.setattr(early, "_busy", lambda: 50_000 + spent[0])
    monkeypatch.setattr(early.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(early.time, "process_time", lambda: 8.0)
    monkeypatch.setattr(early.time, "sleep", sleep)
    assert early.others() == pytest.approx(1.0)


@pytest.mark.skipif(early._busy() is None, reason="nothing counts here")
def test_a_busy_program_is_seen():
    """By one that sleeps meanwhile, on the same core, which is then busy throughout."""
    core = min(early._cores())
    program = "import os, sys, time; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    spins = subprocess.Popen([sys.executable, "-c", program + "\nwhile True: pass", str(core)])
    try:
        looks = program + "from common import early; time.sleep(1); print(early.others())"
        done = subprocess.run([sys.executable, "-c", looks, str(core)], cwd=ROOT, text=True,
                              capture_output=True)
    finally:
        spins.kill()
        spins.wait()
    assert 0.8 < float(done.stdout) < 1.2


@pytest.mark.skipif(early._busy() is None, reason="it looks into /proc")
def test_ctrl_c_while_pytorch_is_imported_shows_no_traceback(tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "ddim.py"), "--train"], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    maps, end = Path("/proc", str(process.pid), "maps"), time.monotonic() + 60
    while "libtorch" not in maps.read_text():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ""
    assert not list(tmp_path.iterdir())
