"""A GPU that does not wait for Python: work recorded as a CUDA graph, copies nobody waits for.

    update = gpu.recorded(update, c)                  # with --graph: recorded once, then replayed
    told = update(x0, label, first, t, gpu.number(step, c.device))

It knows no method, and of a run nothing.
"""
import sys

import torch

from common.processes import rank, world

WARM = 3  # updates of each kind that run as they are: Adam and the libraries take what they need
KINDS = 32  # of updates; with more, some argument is another value each time


# ------------------------------------------------------------------------------------------- copies
def sent(x, device):
    """The CPU tensor x on the device, by a copy that the program does not wait for."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def number(value, device):
    """A number as a 0-d tensor on the device: int64, or float32. Nothing is waited for."""
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    return torch.full((), value, dtype=dtype, device=device)


def caught_up(device):
    """Wait until a GPU has done what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------- graphs
_failed = ""  # why a recording failed: PyTorch's allocator takes no other one in this process then


def record(compute, what, pool=None):
    """The graph of compute(), without computing it, and the tensors that it writes.

    None, None where it cannot be recorded; why is said of `what`.
    """
    global _failed
    if _failed:
        print(f"{what} without a CUDA graph: another one could not be recorded", file=sys.stderr)
        return None, None
    before, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            return graph, compute()
    except RuntimeError as fault:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
        cause = fault.__context__ or fault  # to end the capture fails too
        _failed = " ".join(str(cause).split())
        print(f"{what} without a CUDA graph: {_failed}", file=sys.stderr)
        return None, None


def adam(device):
    """What Adam is told on this device: one kernel for all weights, and on CUDA no word to Python.

    So it is the same whether an update is recorded or not.
    """
    return dict(fused=device.type != "mps", capturable=device.type == "cuda")


def recorded(update, c):
    """A training's update(*arguments), with --graph on CUDA replayed from a recorded graph.

    One update of a small batch is thousands of kernels, each shorter than Python takes to launch
    it; a graph launches them all at once. For that, what changes from one update to the next must
    be among the arguments: tensors on c.device, and plain values where the computation branches.
    Each combination of shapes and plain values is a kind with a graph of its own. What else update
    reads, it finds in the same memory each time: weights, moments, tables. It starts with
    zero_grad(set_to_none=True), changes tensors in place, and returns a dict of tensors, which the
    next call overwrites.

    Each call is one update, and none is computed twice or left out: the first WARM of a kind run as
    they are, and recording, which computes nothing, is followed by the first replay. An update that
    cannot be recorded goes on as it is, and why is said. With several processes nothing is. The
    function that is returned has its graphs as .graphs, a dict.
    """
    if not c.graph or c.device.type != "cuda":
        return update
    if world() > 1:
        if rank() == 0:
            print("--graph records nothing with several processes", file=sys.stderr)
        return update
    seen, graphs = {}, {}  # kind -> updates so far; graph, what it reads, what it writes
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def replay(*arguments):
        kind = tuple((a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a
                     for a in arguments)
        if kind not in seen and len(seen) == KINDS:
            print(f"of more than {KINDS} kinds of updates these are recorded, and no others: an "
                  "argument may be another value each time", file=sys.stderr)
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= WARM:
            return _beside(side, update, arguments)
        if kind not in graphs and len(seen) <= KINDS:
            reads = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            graph, writes = record(lambda: _detached(update(*reads)), "training", pool)
            graphs[kind] = graph, reads, writes
        graph, reads, writes = graphs.get(kind, (None, None, None))
        if graph is None:
            return _detached(update(*arguments))
        for mine, theirs in zip(reads, arguments):
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs)
        graph.replay()
        return writes

    replay.graphs = graphs
    return replay


def _detached(told):
    """Without what autograd keeps of an update, whose streams another recording would meet."""
    return {name: value.detach() for name, value in told.items()}


def _beside(side, update, arguments):
    """update(*arguments) on a stream of its own, as what comes before a recording must be."""
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        told = _detached(update(*arguments))
    torch.cuda.current_stream().wait_stream(side)
    return told
