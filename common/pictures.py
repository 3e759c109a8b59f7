"""What a person looks at: grids, trajectories, scatter plots, curves; and samples as files.

It knows tensors and files: no flags, no method and no network.
"""
import csv
import io
import math
import re
import sys
from pathlib import Path

import torch

from common.files import written


def to_uint8(x):
    """[-1, 1] to 0..255, rounded to the nearest level: uint8 on the CPU, of any shape."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def single(image):
    """A uint8 picture (C, H, W) as PIL, at its own size."""
    from PIL import Image
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def grid(images, columns=None):
    """One PIL picture of uint8 images (N, C, H, W), row by row; small ones are seen enlarged."""
    n, channels, h, w = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    gap = max(1, h // 16)
    height, width = -(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap
    sheet = torch.full((channels, height, width), 64, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, y:y + h, x:x + w] = image
    picture, factor = single(sheet), max(1, 48 // max(h, w))
    enlarged = (picture.width * factor, picture.height * factor)
    return picture.resize(enlarged, 0)  # 0: the nearest pixel


def scatter(points):
    """One PIL picture of points (N, 2) in [-1.25, 1.25]."""
    from PIL import Image
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(5, 5), dpi=100)).subplots()
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    figure.savefig(drawn := io.BytesIO(), format="png")
    return Image.open(drawn)


def curves(folder):
    """Draw loss.png from a run's metrics.csv: every column over the updates, one panel each.

    A vector's name_1, name_2, ... share theirs. Of a long run the means of neighbours are shown,
    300 points. A row may have nothing in a column: it was not logged then.
    """
    from matplotlib.figure import Figure
    path = Path(folder) / "metrics.csv"
    try:
        header, table = table_of(path) if path.exists() else ([], [])
    except ValueError as fault:  # a program that writes into it is no reason to stop
        print(fault, file=sys.stderr)
        return
    # A last row of a few updates may be one in which a lazy term was not computed at all.
    steps = [int(row["step"]) for row in table]
    if len(steps) > 2 and steps[-1] - steps[-2] < (steps[-2] - steps[-3]) / 2:
        table = table[:-1]
    panels = {}  # what is shown -> its columns
    for name in header:
        if name not in ("step", "seconds") and any(row[name] for row in table):
            panels.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    if not panels:
        return
    wide = 1 if len(panels) < 3 else 2
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(6 * wide, 2.4 * high), dpi=100, layout="constrained")
    places = figure.subplots(high, wide, squeeze=False).flat
    for (what, names), axes in zip(panels.items(), places):
        least, most = math.inf, -math.inf
        for name in names:
            rows = [row for row in table if row[name]]
            many = math.ceil(len(rows) / 300)
            parts = [rows[i:i + many] for i in range(0, len(rows), many)]
            step = [sum(float(row["step"]) for row in part) / len(part) for part in parts]
            value = [sum(float(row[name]) for row in part) / len(part) for part in parts]
            axes.plot(step, value, linewidth=1, label=name.removeprefix(what + "_"))
            least, most = min(least, *value), max(most, *value)
        axes.set(xlabel="update", ylabel=what)
        if 0 < 10 * least < most:
            axes.set(yscale="log")
        if len(names) > 1:
            axes.legend(fontsize="small")
    for axes in places:  # a place without a panel
        axes.remove()
    with written(Path(folder) / "loss.png") as file:
        figure.savefig(file, format="png")


def table_of(path):
    """metrics.csv as its header and its rows, dicts of texts, also where a spreadsheet wrote it.

    Such a one has ";" or tabs between the numbers, commas in them, blank lines, a mark in front. A
    last line without an end is half of one, and left out. ValueError where it is no table.
    """
    try:
        return _table(Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, OverflowError, csv.Error) as fault:
        raise ValueError(f"{path} cannot be read as a table ({fault})") from None


def _table(text):
    whole = [line for line in text.splitlines(keepends=True) if line.endswith(("\n", "\r"))]
    lines = [line for line in whole if line.strip(";,\t\r\n ")]
    between = next((mark for mark in ";\t" if lines and mark in lines[0]), ",")
    if between != ",":
        lines = [line.replace(",", ".") for line in lines]
    header, *rows = list(csv.reader(lines, delimiter=between)) or [[]]
    header = [name for name in header if name]
    table = []
    for values in rows:
        row = dict(zip(header, values + [""] * len(header)))
        for value in filter(None, row.values()):
            float(value)
        table.append(row | {"step": str(int(float(row.get("step", ""))))})
    return header, table


def lines(path, x, named, xlabel, ylabel):
    """Write one panel of curves over x as a PNG; named: name -> as many numbers as x has."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, values in named.items():
        axes.plot(x, values, linewidth=1, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small")
    with written(path) as file:
        figure.savefig(file, format="png")


def save(path, x, labels=None, frames=(), columns=None):
    """Write samples by the path's ending; nothing half-written is ever under its name.

    x: (N, C, H, W) in [-1, 1] or uint8, or float points (N, 2); labels: (N,) or None; frames: the
    trajectory for a .gif, tensors like x from noise to sample (with none, a .gif has one frame);
    columns: of the grid, default about as many as rows. Returns the path. By its ending it holds
        .png  a grid or scatter plot
        .gif  the frames
        .npz  arr_0 uint8 (N, H, W, C) or float32 (N, 2), arr_1 labels, -1 for none
        none  is a folder with one PNG each
    Image files have the channels the pictures have: 1 or 3. OSError where it cannot be written.
    """
    import numpy as np
    path, points = Path(path), x.ndim == 2

    def shown(a):
        if points:
            return a.cpu()
        return a if a.dtype == torch.uint8 else to_uint8(a)

    x, frames = shown(x), [shown(frame) for frame in frames or [x]]
    if path.suffix == ".npz":
        array = x.float() if points else x.permute(0, 2, 3, 1)
        classes = np.full(len(x), -1) if labels is None else labels.cpu().numpy()
        with written(path) as file, open(file, "wb") as handle:
            np.savez(handle, array.numpy(), classes)
    elif path.suffix == ".png":
        with written(path) as file:
            (scatter(x) if points else grid(x, columns)).save(file, format="PNG")
    elif path.suffix == ".gif":
        stills = [(scatter(frame) if points else grid(frame, columns)) for frame in frames]
        # of greys all are kept; of colours the 256 that each frame needs
        stills = [still.convert("P") if still.mode == "L" else still.convert("RGB").quantize()
                  for still in stills]
        rest = stills[1:] + stills[-1:] * 10  # the last one stays
        with written(path) as file:
            stills[0].save(file, format="GIF", save_all=True, append_images=rest, duration=100,
                           loop=0)
    else:
        for i in range(len(x)):
            with written(path / f"{i:05}.png") as file:
                (scatter(x[i:i + 1]) if points else single(x[i])).save(file, format="PNG")
    return path
