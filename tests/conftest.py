"""What the tests share: settings as the scripts' own tables make them, and running a script.

Tests run from the repository root, on one thread: two threads on two busy cores can be slower than
one, and less exact. Scripts run in this process where nothing speaks against it, which spares their
start: signals, killing, limits, several processes and imports need a process of their own.
"""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread beside the tests

from common import files, flags  # noqa: E402

SMALL = ["--width", "8", "--multipliers", "1,2", "--attention", "4", "--heads", "2", "--size", "8",
         "--batch", "16", "--lr", "2e-3"]
SMALL = {"ddpm": [*SMALL, "--T", "100"],
         "ddim": [*SMALL, "--T", "100"],
         "vdm": [*SMALL, "--gamma", "learned"],  # which has a state of its own
         "shortcut_mcmc": [*SMALL, "--T", "100", "--fidelity", "0.2", "--K", "3", "--part", "8"],
         "ldm": [*SMALL, "--T", "100", "--f", "2", "--channels", "3", "--width-ae", "8"],
         "ddgan": [*SMALL, "--batch", "64", "--width-d", "8", "--z", "10", "--pretrain", "50",
                   "--r1-every", "4"]}
ITERS = {"ddpm": "200", "ddim": "200", "vdm": "200", "shortcut_mcmc": "200", "ldm": "200",
         "ddgan": "80"}
STEPS = {script: ["--steps", "7"] for script in SMALL} | {"ddgan": []}  # ddgan.py takes its T


@pytest.fixture(autouse=True)
def from_python(monkeypatch):
    """Every test begins as from Python: errors are raised until flags.parse is called."""
    monkeypatch.setattr(files, "program", "")
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)  # parse sets its own
    files.unlock()
    torch.set_num_threads(1)


def settings(script, **changes):
    """c as the script's tables make it, on the CPU in fp32; what is no flag is set as it is.

    A new flag has its default here, so no test that does not mean it need know it.
    """
    c = flags.settings(script.__name__, script.FLAGS, script.RECIPES, device="cpu",
                       precision="fp32")
    given = {name: value for name, value in changes.items() if name in c.fields}
    c = flags.settings(script.__name__, script.FLAGS, script.RECIPES,
                       **dict(device="cpu", precision="fp32") | given)
    vars(c).update(dict(labels=0, shape=(1, 16, 16), vocabulary=(), longest=0) | changes)
    return c


HALVES = {script: ["--train", "--iters", "30", *SMALL[script], "--device", "cpu", "--conditional"]
          for script in SMALL}  # what two processes do, and one
HALVES["ddgan"] += ["--pretrain", "10"]
HALVES["ldm"] += ["--latent", "vq", "--codes", "16"]  # whose use is counted over both
HALVES["ldm"] += ["--data", "words"]  # of which each drops the words of its own half


def command(script, *given):
    """fp32, which the curves and bounds here were measured with, also where `auto` is bf16."""
    acts = {"--train", "--sample", "--evaluate", "--encode", "--interpolate", "--walk"} & {*given}
    fp32 = ["--precision", "fp32"] if acts else []
    return [sys.executable, str(ROOT / f"{script}.py"), *fp32, *map(str, given)]


def run(folder, script, *given, code=0):
    """The script's main in this process, in that folder; its stdout, stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    status = 0
    try:
        sys.argv = command(script, *given)[1:]
        with contextlib.chdir(folder), contextlib.redirect_stdout(out):
            with contextlib.redirect_stderr(err):
                __import__(script).main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        files.program = ""
        files.unlock()  # which the end of a process would do
    assert status == code, err.getvalue()[-2000:]
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def start(folder, script, *given, before="", **more):
    """The script in a process of its own, on one thread; `before`: Python that runs first."""
    arguments = command(script, *given)
    if before:
        arguments[1:2] = ["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {before}; "
                          f"import {script}; {script}.main()"]
    return subprocess.Popen(arguments, cwd=folder, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


# ----------------------------------------------------------------------- programs that take long
PROGRAMS = {  # Triton is compiled or interpreted, for a whole process; runs are killed, or shared
    "aot": (["aot.py", "--targets", "90", "--dtypes", "bf16,fp32"], {}),
    "launches": (["-c", "import aot; aot.fake_launches(); aot.torn_is_seen(); "
                  "aot.own_launcher(); print('launches right')"], {}),
    "group_norm": (["interp_group_norm.py"], {"TRITON_INTERPRET": "1"}),
    "diffuse": (["interp_noise_diffuse.py", "diffuse"], {"TRITON_INTERPRET": "1"}),
    "noise": (["interp_noise_diffuse.py", "noise"], {"TRITON_INTERPRET": "1"}),
}
for _script in SMALL:
    PROGRAMS[f"killed-{_script}"] = (["killed.py", "FOLDER", _script], {})
    PROGRAMS[f"two-{_script}"] = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--",
         *command(_script, *HALVES[_script], "--run", f"FOLDER/two-{_script}",
                  "--data-root", "FOLDER/data")[1:]], {})
_ahead = {}  # process, folder


def pytest_collection_modifyitems(items):
    """Tests that wait for a program come last, and all of test_scripts.py's, most of the waiting.

    Together, lest the models that they share be trained a second time for those that wait.
    """
    items.sort(key=lambda item: (item.path.name == "test_scripts.py",
                                 item.get_closest_marker("program") is not None))


def pytest_collection_finish(session):
    """Start the programs that the tests will ask for, in one process beside them."""
    marks = [item.get_closest_marker("program") for item in session.items]
    names = list(dict.fromkeys(mark.args[0] for mark in marks if mark))
    if not find_spec("triton"):
        names = [name for name in names if "-" in name]
    if not names or session.config.option.collectonly:
        return
    _ahead["folder"] = Path(tempfile.mkdtemp())
    jobs = json.dumps([[name, *PROGRAMS[name]] for name in names])
    driver = [sys.executable, str(ROOT / "tests" / "ahead.py"), str(_ahead["folder"]), jobs]
    _ahead["process"] = subprocess.Popen(driver, start_new_session=True)


def pytest_sessionfinish():
    if "process" in _ahead:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(_ahead["process"].pid, signal.SIGTERM)
        _ahead["process"].wait()
        shutil.rmtree(_ahead["folder"], ignore_errors=True)


@pytest.fixture
def program(request):
    """The output of the program of the test's mark, `pytest.mark.program(name)`."""
    name = request.node.get_closest_marker("program").args[0]
    if "-" not in name:
        pytest.importorskip("triton")
    status, output = (_ahead["folder"] / f"{name}.{ending}" for ending in ("status", "txt"))
    while not status.exists():
        assert _ahead["process"].poll() is None, "the process that runs the programs has died"
        time.sleep(0.1)
    text = output.read_text()
    failed = [line for line in text.splitlines() if "FAILED" in line]
    assert status.read_text() == "0", "\n".join(failed) or text[-3000:]
    return text


@pytest.fixture
def beside(program):
    """The folder that the programs leave their runs in, once the test's own has ended."""
    return _ahead["folder"]
