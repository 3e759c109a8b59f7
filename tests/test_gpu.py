"""common/gpu.py: recorded updates. A graph made of Python stands for CUDA's.

It is as strict as one: recording computes nothing, and a replay sees only what lies in the memory
that was recorded. The same for real runs on a GPU is at the end.
"""
import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from common import gpu, runs
from conftest import ROOT, SMALL, run
from test_data import folder as pictures
from test_ldm_words import halves
from test_scripts import losses, same, weights

CUDA = SimpleNamespace(graph=True, device=SimpleNamespace(type="cuda"))


def plain_values(update):
    """What a function finds around it that a graph would keep as it was: values, and addresses."""
    found = {}
    for name, cell in zip(update.__code__.co_freevars, update.__closure__ or ()):
        value = cell.cell_contents
        found[name] = value.data_ptr() if isinstance(value, torch.Tensor) else \
            value if isinstance(value, (int, float, str, tuple, type(None))) else id(value)
    return found


class Strict(TorchDispatchMode):
    """Raises where a GPU would be waited for, or read from Python's memory: nothing that can be
    recorded. Three places go another way on CUDA."""
    FORBIDDEN = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2",
                 "lift_fresh", "unique_dim", "repeat_interleave.Tensor"}
    ELSEWHERE = {"update in runs.py", "denoise_step in diffuse.py", "philox in noise.py"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        masked = name == "index.Tensor" and any(i.dtype == torch.bool for i in args[1]
                                                if i is not None)
        if masked or {name, name.partition(".")[0]} & self.FORBIDDEN:
            frame, places = sys._getframe(), set()
            while frame:
                code = frame.f_code
                places.add(f"{code.co_name} in {code.co_filename.rpartition('/')[2]}")
                frame = frame.f_back
            assert places & self.ELSEWHERE, f"{name} cannot be recorded"
        return function(*args, **kwargs or {})


class PythonGraph:
    """A CUDA graph without CUDA."""

    def replay(self):
        assert plain_values(self.update) == self.around, "a graph keeps what it was recorded with"
        with contextlib.nullcontext() if self.replays else Strict():
            told = self.update(*self.reads)
        assert told.keys() == self.writes.keys()
        for name, value in told.items():
            self.writes[name].copy_(value.detach())
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch):
    """The graphs recorded so far, by what stands for torch.cuda; gpu.recorded takes the CPU."""
    kept, recording, real = [], [], gpu.recorded

    @contextlib.contextmanager
    def graph(new, pool):
        assert pool == "pool"
        recording.append(new)
        kept.append(new)
        try:
            yield
        finally:
            recording.pop()

    def recorded(update, c):
        before = []

        def watched(*arguments):
            if not recording:
                before[:] = [update(*arguments)]
                return before[0]
            new = recording[-1]  # nothing is computed
            new.update, new.reads, new.replays = update, arguments, 0
            new.around = plain_values(update)
            new.writes = {name: torch.full_like(value, torch.nan, dtype=torch.float32)
                          for name, value in before[0].items()}
            return new.writes
        return real(watched, CUDA)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(current_stream=lambda: stream, Stream=lambda: stream,
                            stream=lambda s: contextlib.nullcontext(), CUDAGraph=PythonGraph,
                            graph=graph, graph_pool_handle=lambda: "pool",
                            set_stream=lambda s: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "recorded", recorded)
    monkeypatch.setattr(gpu, "_failed", "")
    return kept


# ------------------------------------------------------------------------------------ the updates
def test_every_call_is_one_update(graphs):
    """Of each kind, shape or plain value, the first as they are, then replayed; none is lost."""
    total = torch.zeros(())

    def update(x, sign, extra):
        total.add_(sign * x.sum() + (0 if extra is None else extra.sum()))
        return dict(total=total)

    add = gpu.recorded(update, CUDA)
    want, two = 0.0, torch.ones(2)
    for i in range(96):
        sign = (1, -2)[i % 2]
        x = torch.full((1 + i % 3,), float(i))
        extra = two * i if i % 4 == 0 else None
        want += sign * x.sum().item() + (0 if extra is None else extra.sum().item())
        assert add(x, sign, extra)["total"].item() == want == total.item()
    # of each of the 3 shapes three kinds: sign -2, and sign 1 with something extra and without
    assert len(graphs) == 9 and sum(graph.replays for graph in graphs) == 96 - 9 * gpu.WARM


def test_what_cannot_be_recorded_goes_on_as_it_is(graphs, monkeypatch, capsys):
    total = torch.zeros(())

    def update(x):
        total.add_(x.sum())
        return dict(total=total)

    @contextlib.contextmanager
    def fails(graph, pool):
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        except RuntimeError:
            raise RuntimeError("capture failed")  # as PyTorch's end of one
        yield

    monkeypatch.setattr(torch.cuda, "graph", fails)
    add = gpu.recorded(update, CUDA)
    for i in range(8):
        assert add(torch.tensor(1.0))["total"] == i + 1
    said = capsys.readouterr().err
    assert said == ("training without a CUDA graph: operation not permitted when stream is "
                    "capturing\n")
    # PyTorch's allocator takes no other recording after one that failed
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: pytest.fail("it tries again"))
    for i in range(8):
        assert add(torch.ones(2))["total"] == 8 + 2 * (i + 1)
    said = capsys.readouterr().err
    assert said == "training without a CUDA graph: another one could not be recorded\n"


def test_an_argument_that_never_comes_twice_is_told(graphs, capsys):
    total = torch.zeros(())

    def update(x, rate):
        total.add_(rate * x)
        return dict(total=total)

    add = gpu.recorded(update, CUDA)
    one = torch.tensor(1.0)
    for i in range(5):
        add(one, 0)
    for i in range(100):
        assert add(one, i)["total"] == sum(range(i + 1))
    assert len(graphs) == 1 and capsys.readouterr().err.count("more than 32 kinds") == 1
    assert add(one, 0)["total"] == sum(range(100)) and graphs[0].replays == 4


def test_what_cannot_be_recorded_is_seen_without_a_gpu():
    """The stand-in is as strict as a GPU: about numbers read by Python, masks, and new tensors."""
    x = torch.arange(3.0)
    for wrong in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor([1.0]) + x,
                  lambda: x.long().bincount(), lambda: bool((x > 0).any())):
        with pytest.raises(AssertionError, match="cannot be recorded"), Strict():
            wrong()
    with Strict():
        total = x.square().sum()
    assert total == 5


def test_several_processes_record_nothing(monkeypatch, capsys):
    def update():
        return {}

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpu.recorded(update, CUDA) is update
    assert capsys.readouterr().err == "--graph records nothing with several processes\n"
    monkeypatch.setenv("RANK", "1")
    assert gpu.recorded(update, CUDA) is update and not capsys.readouterr().err


def test_nothing_is_recorded_that_was_not_asked_for(monkeypatch):
    def update():
        return {}

    cpu = torch.device("cpu")
    assert gpu.recorded(update, SimpleNamespace(graph=True, device=cpu)) is update
    assert gpu.recorded(update, SimpleNamespace(graph=False, device=CUDA.device)) is update


def test_a_graph_without_a_gpu_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("here it is allowed")
    done = run(tmp_path, "ddim", "--train", "--graph", code=2)
    said = "ddim.py: error: --graph is for a CUDA GPU, and this is cpu: leave it out\n"
    assert done.stderr == said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- whole trainings
# script, flags, kinds of updates that come often enough to be recorded
TRAININGS = [
    ("ddpm", ["--iters", 30, "--conditional"], 1),
    ("ddpm", ["--iters", 20, "--variance", "learned", "--precision", "bf16"], 1),
    ("ddim", ["--iters", 30, "--flip"], 1),
    ("vdm", ["--iters", 30, "--conditional"], 1),
    ("vdm", ["--iters", 20, "--weight", "bound", "--ends", "learned"], 1),
    ("shortcut_mcmc", ["--iters", 30, "--conditional"], 2),
    ("shortcut_mcmc", ["--iters", 20, "--alternate", "--checkpoint-chain"], 2),
    ("ldm", ["--iters", 20, "--latent", "vq", "--codes", 16, "--conditional"], 2),
    ("ldm", ["--iters", 20, "--data", "halves", "--captions", "--consistency", 0.5], 2),
    ("ddgan", ["--iters", 52, "--pretrain", 36, "--pretrain-z", 16, "--conditional"], 5),
    ("ddgan", ["--iters", 30, "--T", 1, "--pretrain", 0], 2)]


def both(folder, script, more, device):
    """The script trained plainly in runs/plain, and with what records in runs/recorded."""
    given = ["--train", *SMALL[script], *more, "--device", device]
    if "halves" in more and not (folder / "halves").exists():
        pictures(folder / "halves", halves())
    with pytest.MonkeyPatch.context() as patch:  # kinds that come seldom come often
        patch.setattr(sys.modules["ddgan"], "HEAD_START", 16)
        patch.setattr(ldm, "REVIVE", 5)
        run(folder, script, *given, "--run", "recorded", *(["--graph"] if device == "cuda" else []))
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(gpu, "recorded", lambda update, c: update)
            run(folder, script, *given, "--run", "plain")


def assert_same_run(folder, script):
    """Weights, means, moments and what was logged, bit for bit."""
    for stage in ([".", "autoencoder"] if script == "ldm" else ["."]):
        one, other = weights(folder / "recorded" / stage), weights(folder / "plain" / stage)
        assert one.keys() == other.keys() and "optimizer" in one
        for name in ("net", "autoencoder", "ema", "optimizer", "critic", "optimizer_d"):
            assert name not in one or same(one[name], other[name]), name
        curves = losses(folder / "recorded" / stage), losses(folder / "plain" / stage)
        assert (curves[0] == curves[1]).all()


@pytest.mark.parametrize("script, more, kinds", TRAININGS,
                         ids=[f"{script}{i}" for i, (script, *_) in enumerate(TRAININGS)])
def test_a_recorded_training_is_the_same_to_the_bit(script, more, kinds, graphs, tmp_path):
    both(tmp_path, script, more, "cpu")
    assert len(graphs) == kinds and all(graph.replays for graph in graphs)
    assert_same_run(tmp_path, script)


def test_a_run_may_be_recorded_from_where_it_was_stopped(graphs, tmp_path, monkeypatch):
    given = ["--train", *SMALL["ddpm"], "--device", "cpu"]
    run(tmp_path, "ddpm", *given, "--iters", "30", "--run", "one")
    monkeypatch.undo()
    run(tmp_path, "ddpm", *given, "--iters", "10", "--run", "two")
    assert len(graphs) == 1
    run(tmp_path, "ddpm", *given, "--iters", "30", "--run", "two")
    assert same(weights(tmp_path / "one")["net"], weights(tmp_path / "two")["net"])


# ------------------------------------------------------------------------------- what a graph needs
class OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""
    is_cuda = True


def test_the_running_mean_on_a_gpu_is_that_of_the_cpu():
    """There the decay is a tensor, computed from the count of updates."""
    net = torch.nn.Linear(3, 2)
    for decay in (0.9, 0.9999):
        here, there = runs.EMA(net, decay), runs.EMA(net, decay)
        there.updates = there.updates.as_subclass(OnGpu)
        for step in range(200):
            with torch.no_grad():
                net.weight.add_(torch.randn(2, 3))
            here.update(net)
            there.update(net)
        assert int(there.updates) == 200 == there.state_dict()["updates"]
        assert_close(torch.Tensor(there.net.weight), here.net.weight, rtol=1e-5, atol=1e-5)


def test_a_rate_that_a_graph_reads_stays_where_it_is():
    w = torch.nn.Parameter(torch.ones(2))
    groups = [dict(params=[w]), dict(params=[w.detach()], scale=0.5), dict(params=[])]
    optimizer = torch.optim.Adam(groups, 1e-3)
    for group in optimizer.param_groups:
        group["capturable"] = True
    runs.set_rate(optimizer, 0.25)
    first = [group["lr"] for group in optimizer.param_groups[:2]]
    runs.set_rate(optimizer, 0.5)
    assert [rate.item() for rate in first] == [0.5, 0.25]
    assert all(a is group["lr"] for a, group in zip(first, optimizer.param_groups))
    for group in optimizer.param_groups:
        group["capturable"] = False
    runs.set_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.0625, 0.125]


# ---------------------------------------------------------------------------------------- on a GPU
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("script, more, kinds", TRAININGS,
                         ids=[f"{script}{i}" for i, (script, *_) in enumerate(TRAININGS)])
def test_gpu_a_recorded_training_is_that_of_a_plain_one(script, more, kinds, tmp_path, monkeypatch):
    """Trained, stopped and gone on with, by deterministic kernels: bit for bit."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay",
                        lambda graph: replays.append(graph) or replay(graph))
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with torch.backends.cudnn.flags(deterministic=True), sdpa_kernel(SDPBackend.MATH):
        both(tmp_path, script, more, "cuda")
        assert len(set(map(id, replays))) >= kinds
        iters = more[1] + 10
        both(tmp_path, script, [more[0], iters, *more[2:]], "cuda")
    assert_same_run(tmp_path, script)


@on_gpu
def test_gpu_after_an_update_that_cannot_be_recorded_all_goes_on():
    """In a process of its own, which nothing can be recorded in afterwards."""
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "18.0\n", done.stderr
    assert done.stderr.count("training without a CUDA graph") == 2


FAILING = """
from types import SimpleNamespace
import torch
from common import gpu
c = SimpleNamespace(graph=True, device=torch.device("cuda", 0))
total = torch.zeros((), device=c.device)
def update(x):
    total.add_(x.sum().item())
    return dict(total=total)
add = gpu.recorded(update, c)
for size in (1, 2):
    for _ in range(6):
        add(torch.ones(size, device=c.device))
print(total.item())
"""


@on_gpu
def test_gpu_pictures_are_gathered_from_a_copy_there(monkeypatch):
    from common.data import load
    data = load("digits")
    index, flip = torch.tensor([3, 17_000, 3]), torch.tensor([True, False, False])
    device = torch.device("cuda:0")
    want = data.batch(index, "cpu", flip)
    for got in (data.batch(index, device, flip), data.batch(index, device, flip)):
        assert_close(got[0].cpu(), want[0])
        assert_close(got[1].cpu(), want[1])
    assert data.there.device == device
    data.there = None
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=data.images.nbytes))
    assert_close(data.batch(index, device, flip)[0].cpu(), want[0])
    assert data.there is None
