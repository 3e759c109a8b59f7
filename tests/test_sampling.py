"""common/sampling.py: guidance, graphs, batches. A graph made of Python stands for CUDA's."""
import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import ddgan
import ddim
import ddpm
from common import gpu, sampling
from common.schedules import alpha_bar, timesteps
from conftest import settings


# -------------------------------------------------------------------------------------- guidance
def test_guidance_is_one_evaluation_of_a_doubled_batch():
    calls = []

    def net(x, time, label=None, context=None):
        calls.append((len(x), time.tolist()))
        return x + label.view(-1, 1) + context.mean((1, 2)).view(-1, 1)

    c = SimpleNamespace(guidance=3.0, precision="fp32", device=torch.device("cpu"))
    x, label = torch.zeros(2, 1), torch.tensor([4, 5])
    given = dict(label=label, context=torch.ones(2, 3, 2))
    without = dict(label=9, context=torch.full((2, 3, 2), 0.5))
    out, out_uncond = sampling.guided(c, net, x, torch.tensor([0.5]), given, without)
    assert out.flatten().tolist() == [5, 6] and out_uncond.flatten().tolist() == [9.5, 9.5]
    assert calls == [(4, [0.5] * 4)]
    c.guidance = 1.0
    out, out_uncond = sampling.guided(c, net, x, torch.tensor([0.5]), given, without)
    assert out.flatten().tolist() == [5, 6] and out_uncond is None and calls[-1][0] == 2

    def unlabelled(x, time, label=None):
        return x + 7 if label is None else x
    out, out_uncond = sampling.guided(c, unlabelled, x, torch.tensor([0.5]), dict(label=None), {})
    assert out.flatten().tolist() == [7, 7] and out_uncond is None
    c.guidance = 3.0  # never silently without
    with pytest.raises(ValueError, match="guidance 3.0 needs what it guides by: give label"):
        sampling.guided(c, unlabelled, x, torch.tensor([0.5]), dict(label=None), {})


# ---------------------------------------------------------------------------------------- graphs
class FakeGraph:
    """A CUDA graph without CUDA.

    replay() runs the captured step again, on the very tensors that it was captured with, into the
    very tensors that it returned.
    """

    def __init__(self):
        self.again = self.results = None

    def replay(self):
        for kept, new in zip(self.results, self.again()):
            kept.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs captured so far, by what stands for torch.cuda."""
    captured = []

    @contextlib.contextmanager
    def capture(graph, pool):
        captured.append(graph)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(current_stream=lambda: stream, Stream=lambda: stream,
                            stream=lambda s: contextlib.nullcontext(), CUDAGraph=FakeGraph,
                            graph=capture, set_stream=lambda s: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(sampling, "_graphs", {})
    monkeypatch.setattr(gpu, "_failed", "")
    return captured


def recorded(graphs, compute):
    """What a step returns: compute(), and within a capture it is kept for the replays."""
    results = compute()
    if graphs and graphs[-1].again is None:
        graphs[-1].again, graphs[-1].results = compute, results
    return results


def test_captured_once_for_each_shape_and_every_tensor_is_handed_over(graphs):
    def step(c, net, x, t, label):
        return recorded(graphs, lambda: (net.scale * x + t, x - t if label is None else x * label))

    c = SimpleNamespace(device=torch.device("cuda"))
    plain = SimpleNamespace(device=torch.device("cpu"))
    for net in (SimpleNamespace(scale=2.0), SimpleNamespace(scale=-1.0)):
        graph, eager = sampling.captured(step, c, net), sampling.captured(step, plain, net)
        for size in (4, 3, 4):  # the second batch of four replays the first one's graph
            x = torch.arange(size).float()
            for label in (None, torch.arange(size).float()):
                for t in torch.tensor([[5.0], [2.0]]):
                    for got, want in zip(graph(x, t, label), eager(x, t, label)):
                        assert_close(got, want)
    assert len(graphs) == 8  # two networks, two sizes, with label and without


def test_guidance_in_a_loop_draws_by_each_weight(graphs):
    """As a notebook has it: one c whose flag changes between the calls."""
    def step(c, net, x):
        return recorded(graphs, lambda: (c.guidance * x,))

    c = SimpleNamespace(device=torch.device("cuda"), guidance=1.0, seed=0, given={"guidance"})
    net, x = object(), torch.tensor([1.0])
    drawn = []
    down = sampling.captured(step, c, net)  # before the values change, too
    for c.guidance in (1.0, 2.0, 4.0, 2.0):
        drawn.append(sampling.captured(step, c, net)(x)[0].item())
        assert down(x)[0].item() == drawn[-1]
    assert drawn == [1.0, 2.0, 4.0, 2.0]
    assert len(graphs) == 3  # the second 2.0 replays
    c.seed = 5  # a tensor among the arguments says which
    sampling.captured(step, c, net)(x)
    assert len(graphs) == 3


def test_a_plain_value_among_the_arguments_is_part_of_the_key(graphs):
    def step(c, net, x, clip):
        return recorded(graphs, lambda: (x.clamp(-1, 1) if clip else x.clone(),))

    graph = sampling.captured(step, SimpleNamespace(device=torch.device("cuda")), None)
    x = torch.tensor([3.0])
    assert [graph(x, clip)[0].item() for clip in (True, False, True)] == [1.0, 3.0, 1.0]
    assert len(graphs) == 2


def test_what_is_returned_is_the_caller_s_own(graphs):
    """A multistep sampler: no replay may overwrite the x0 of the step before."""
    ab = alpha_bar("cosine", 100).float()

    def step(c, net, x, t):
        def compute():
            x0 = net(x, t / 100)
            return 0.5 * x + 0.5 * x0, x0
        return recorded(graphs, compute)

    def second_order(c):
        down = sampling.captured(step, c, lambda x, t: 0.7 * x.tanh() + t)
        x, last, used = torch.ones(4), None, []
        for t in timesteps(100, 5).flip(0):
            x, x0 = down(x, t.view(1))
            x = x + (0 if last is None else 0.3 * (x0 - last)) * ab[t]
            last = x0
            used.append((x0, x0.clone()))
        assert all(torch.equal(now, then) for now, then in used)
        return x

    want = second_order(SimpleNamespace(device=torch.device("cpu")))
    assert not graphs
    assert_close(second_order(SimpleNamespace(device=torch.device("cuda"))), want)
    assert len(graphs) == 1


def test_the_last_eight_graphs_are_kept(graphs):
    def step(c, net, x):
        return recorded(graphs, lambda: (x + c.number,))

    c = SimpleNamespace(device=torch.device("cuda"), number=0)

    def drawn(number):
        c.number = number
        return sampling.captured(step, c, None)(torch.tensor(0.5))[0].item()
    for number in range(8):
        assert drawn(number) == number + 0.5
    assert drawn(0) == 0.5 and len(graphs) == 8  # used again, so 1 is now the oldest
    assert drawn(8) == 8.5 and len(sampling._graphs) == 8
    assert drawn(0) == 0.5 and len(graphs) == 9
    assert drawn(1) == 1.5 and len(graphs) == 10


def test_without_capture_it_says_why_and_goes_on(graphs, monkeypatch, capsys):
    def refuse(graph, pool):
        raise RuntimeError("operation not\npermitted when stream is capturing")
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    triple = sampling.captured(lambda c, net, x: 3 * x,
                               SimpleNamespace(device=torch.device("cuda")), None)
    for value in (1.0, 2.0):
        assert triple(torch.tensor(value)) == 3 * value
    why = "operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"sampling without a CUDA graph: {why}\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", [ddpm, ddim, ddgan])
def test_gpu_a_replayed_step_gives_the_very_pictures_of_the_step(script, monkeypatch):
    monkeypatch.setattr(sampling, "_graphs", {})
    torch.manual_seed(0)
    more = dict(eta=1.0) if script is ddim else {}
    c = settings(script, device=torch.device("cuda"), seed=3, width=32, attention=(8,), **more)
    net = script.network(c).cuda()
    torch.nn.init.normal_(net.last.weight, std=0.1)
    steps = None if script is ddgan else 7

    def pictures():
        return [script.sample(c, net, first, n, steps) for first, n in ((0, 8), (8, 8), (16, 5))]
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "captured", lambda step, c, net: lambda *a: step(c, net, *a))
        want = pictures()
    got = pictures()
    assert len(sampling._graphs) == 2
    assert all(graph is not None for _, _, graph, _ in sampling._graphs.values())
    for a, b in zip(got, want):
        assert_close(a, b, rtol=0, atol=0)


# --------------------------------------------------------------------------------------- batches
def shown(n, **more):
    c = dict(device=torch.device("cpu"), checkpoint="some/checkpoint.pt", labels=3, out="")
    return sampling.Draw(SimpleNamespace(**c | more), n)


def test_samples_are_drawn_in_order_and_refused_where_not_finite():
    draw = shown(600)
    for first, n, label in draw:
        draw.keep(torch.arange(first, first + n) + 1000.0 * label)
    assert_close(draw.samples(), torch.arange(600) + 1000.0 * (torch.arange(600) % 3))
    assert [n for n, _ in draw.laps] == [256, 256, 88] and draw.frames is None
    assert shown(3, out="a.gif").frames == []
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="checkpoint.pt draws samples that are not finite"):
            shown(1).keep(torch.tensor([0.0, bad]))


def test_the_first_batch_warms_up_and_is_told_as_such(tmp_path, capsys):
    draw = shown(2, out=str(tmp_path / "a.npz"))
    draw.keep(torch.zeros(2, 2))
    draw.laps = [(2, 10.0)]
    draw.save(4)
    said = capsys.readouterr().out
    assert "2 samples in 10.0 s, 4 network evaluations each, 5e+03 ms per sample: /" in said
    draw.laps += [(256, 0.256), (100, 0.1)]
    draw.save(4)
    said = capsys.readouterr().out
    assert "10.4 s, 4 network evaluations each, 1 ms per sample once warm: /" in said
