"""Drawing samples: guidance, a step as a CUDA graph, and the batches of one --sample or --evaluate.

It calls a step that it is given, and nothing calls back. It knows no method and no run's inside.
"""
import statistics
import time

import torch

from common import files, flags, gpu, pictures
from common.draws import sample_labels


def guided(c, net, x, time, given, without):
    """The network's output and, for guidance, the one without: one evaluation, of a doubled batch.

    x: (B, ...); time: (1,) or (B,), in the network's unit. given: its further arguments by name,
    tensors (B, ...) or None; without: what stands in their place where nothing is asked for,
    tensors of their shape, or the number that fills it. Returns (out, None) where guidance is 1.
    ValueError for another one where nothing is given. Opens autocast.
    """
    time = time.expand(len(x))
    if c.guidance != 1 and any(value is None for value in given.values()):
        raise ValueError(f"guidance {c.guidance} needs what it guides by: give {', '.join(given)}")
    with flags.autocast(c):
        if c.guidance == 1:
            return net(x, time, **given), None
        both = {}
        for name, value in given.items():
            other = without[name]
            other = other if isinstance(other, torch.Tensor) else torch.full_like(value, other)
            both[name] = torch.cat([value, other])
        return net(torch.cat([x, x]), time.repeat(2), **both).chunk(2)


# --------------------------------------------------------------------------------- graphs on CUDA
LAST = 8  # graphs that are kept
_graphs = {}  # key -> network, arguments that the graph reads, the graph or None, what it writes


def captured(step, c, net):
    """step(c, net, *arguments) as a function of the arguments alone; on CUDA by a graph, replayed.

    A graph is that of the flags' values (flags.values), the network, the shapes of the tensors
    among the arguments and the values of the others: whatever of these changes captures anew. The
    last eight graphs are kept. What is returned is the caller's own: no replay overwrites it. A
    step that cannot be captured runs as it is, and why is said.
    """
    if c.device.type != "cuda":
        return lambda *arguments: step(c, net, *arguments)

    def replay(*arguments):
        worth = flags.values(c)
        shapes = tuple((a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a
                       for a in arguments)
        key = step, id(net), worth, shapes
        if key in _graphs:
            _graphs[key] = _graphs.pop(key)  # now the latest
        else:
            # the network is kept, so that no other one gets its id
            _graphs[key] = net, *_capture(step, c, net, arguments)
            if len(_graphs) > LAST:
                del _graphs[next(iter(_graphs))]
        _, reads, graph, writes = _graphs[key]
        if graph is None:
            return step(c, net, *arguments)
        for mine, theirs in zip(reads, arguments):
            if isinstance(mine, torch.Tensor):
                mine.copy_(theirs)
        graph.replay()
        if isinstance(writes, torch.Tensor):
            return writes.clone()
        return tuple(a.clone() for a in writes)
    return replay


def _capture(step, c, net, arguments):
    """The tensors that the graph of step reads, the graph, what it writes; no graph: None."""
    reads = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):  # compiles, and lets the libraries take their work space
        for _ in range(2):
            step(c, net, *reads)
    before.wait_stream(side)
    return reads, *gpu.record(lambda: step(c, net, *reads), "sampling")


# ------------------------------------------------------------------------------- batches of samples
class Draw:
    """n samples, a batch at a time: `for first, n, label in draw: draw.keep(sample(...))`.

    label: the one class to draw, by name or number, or "" for each in turn. draw.frames is the
    list for a trajectory where --out is a .gif, otherwise None.
    """

    def __init__(self, c, n, label="", batch=256):
        self.c, self.n, self.batch = c, n, batch
        self.label = sample_labels(c, n, label)  # (n,) or None
        self.frames = [] if c.out.endswith(".gif") else None
        self.parts, self.laps = [], []
        if c.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(c.device)

    def __iter__(self):
        for first in range(0, self.n, self.batch):
            many = min(self.batch, self.n - first)
            start = time.perf_counter()
            yield first, many, None if self.label is None else self.label[first:first + many]
            self.laps.append((many, time.perf_counter() - start))

    def keep(self, x):
        """One batch's samples; one that is not finite, black as uint8, ends the program."""
        x = x.cpu()
        if not x.isfinite().all():
            files.stop(f"{self.c.checkpoint} draws samples that are not finite: sample from "
                       "another checkpoint, or with --precision fp32")
        self.parts.append(x)

    def samples(self):
        """All of them: (n, ...) on the CPU."""
        return torch.cat(self.parts)

    def ms(self):
        """Milliseconds per sample: median of the batches after the first, which warms up."""
        return statistics.median(1000 * s / n for n, s in self.laps[1:] or self.laps)

    def save(self, evaluations, name="samples.png", columns=None):
        """Write --out, or the file of that name in the run, and print the line that ends sampling.

        Who went through the batches several times, for a row each, has all of these samples.
        columns: of a sheet, by default about as many as rows.
        """
        x = self.samples()
        rows = len(x) // self.n
        label = None if self.label is None else self.label.repeat(rows)
        each = len(self.frames or ()) // len(self.parts)  # frames of a batch
        frames = [torch.cat(self.frames[i::each]) for i in range(each)]
        with files.inputs():
            path = self.c.out or self.c.run / name
            pictures.save(path, x, label, frames, columns)
        seconds = sum(s for _, s in self.laps)
        warm = " once warm" if len(self.laps) > 1 else ""
        print(f"{len(x)} samples in {seconds:.1f} s, {evaluations} network evaluations each, "
              f"{self.ms():.3g} ms per sample{warm}: {path}")
