"""kernels/bench.py without a GPU: its comparison with float64, and every row that it times, on
small shapes."""
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

pytest.importorskip("triton")


@pytest.fixture
def bench(monkeypatch):
    from kernels import bench
    monkeypatch.setattr(bench, "UNETS", {"tiny": (
        dict(in_channels=3, size=8, width=8, multipliers=(1, 2), blocks=1, attention=()), 2)})
    # whoever imported the kernels first, in_steps asks for Triton's arithmetic
    monkeypatch.setattr(bench.group_norm, "triton", bench.triton)
    return bench


def test_the_shapes_are_those_of_the_network(bench):
    shapes = bench.norm_shapes(*bench.UNETS["tiny"])
    # with the skips beside them
    assert {(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4), (2, 16, 8, 8)} <= {s for s, *_ in shapes}
    assert ((2, 32, 4, 4), 8, False, True) in shapes and ((2, 16, 4, 4), 4, True, True) in shapes


def test_rows(bench):
    bench.check("cpu")
    clock = bench.Clock("cpu", repeats=2)
    rows = [*bench.diffuse_rows(clock, 1.0, [torch.float32], compiled=False),
            *bench.norm_rows(clock, 1.0, [torch.float32], ["tiny"], compiled=False)]
    assert all(math.isfinite(r["ours"]) and math.isfinite(r["eager"]) and r["gbs"] > 0
               for r in rows)
    kinds = {r["name"].split()[0] for r in rows}
    assert kinds == {"randn", "add_noise", "denoise_step", "group_norm"}
    lines = [*bench.whole_rows(clock, "tiny", (2,))]
    assert len(lines) in (4, 5) and all("images/s" in line for line in lines)


GNNHWC = """
import torch.nn.functional as F


class GN_NHWC_Func:
    def apply(x, weight, bias, groups, eps, activation):
        assert weight.dtype == bias.dtype == x.dtype
        y = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(y) if activation == 2 else y
"""


@pytest.mark.parametrize("source, says", (
    (GNNHWC, ""), (GNNHWC.replace("== 2", "== 1"), "gnnhwc computes something else"),
    ("raise RuntimeError('no nvcc')", "no column of gnnhwc: RuntimeError no nvcc")),
    ids=("right", "wrong", "does not build"))
def test_column_of_gnnhwc(bench, monkeypatch, tmp_path, capfd, source, says):
    """As its callers meet it, in plain PyTorch: beside ours where it computes the same."""
    (tmp_path / "gnnhwc").mkdir()
    (tmp_path / "gnnhwc" / "__init__.py").touch()
    (tmp_path / "gnnhwc" / "custom_gn.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    rows = [*bench.norm_rows(bench.Clock("cpu", repeats=1), 1.0, [torch.bfloat16], ["tiny"],
                             compiled=False)]
    for name in set(sys.modules) - known:
        del sys.modules[name]
    for row in rows:
        wanted = not says and "last" in row["name"] and "scale" not in row["name"]
        assert ("gnnhwc" in row) == wanted and math.isfinite(row.get("gnnhwc", 0)), row
    assert any("gnnhwc" in row for row in rows) == (not says) and says in capfd.readouterr().err


def test_column_of_held_tiles(bench, monkeypatch):
    x = torch.empty(2, 32, 32, 32)
    tiles, *_ = bench.group_norm._tiles(x, 2, 16)
    assert bench.in_steps(x, 2) and not bench.in_steps(torch.empty(2, 32, 8, 8), 2)
    steps = lambda: bench.group_norm._in_steps(tiles, 4)["LOOPS"]  # noqa: E731
    assert bench.held(steps) == 1 and steps() == 8
    monkeypatch.setattr(bench, "in_steps", lambda x, groups: x.shape[1:3] == (8, 8))
    rows = bench.norm_rows(bench.Clock("cpu", repeats=1), 1.0, [torch.float32], ["tiny"],
                           compiled=False)
    for row in rows:
        wanted = "backward" in row["name"] and "x8x8x8 " in row["name"]
        assert ("held" in row) == wanted, row


def test_overhead(bench):
    """Both ways launch the same: nothing but Python's time is compared. (In a process where the
    kernels are defined.)"""
    code = ("from kernels import bench; lines = []\n"
            "launches = bench.recorded(lambda: lines.append("
            "bench.overhead(bench.Clock('cpu', repeats=1), calls=2)))\n"
            "print(lines[0], len(launches), {k.fn.__name__ for k, _, _ in launches})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ("of a bare autograd.Function" in done.stdout
            and "16 {'forward_kernel'}" in done.stdout), done.stdout + done.stderr


def test_a_wrong_kernel_is_not_timed(bench, monkeypatch):
    right = bench.group_norm.group_norm
    monkeypatch.setattr(bench.group_norm, "group_norm", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(AssertionError):
        bench.check("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available() or not shutil.which("compute-sanitizer"),
                    reason="needs a GPU and compute-sanitizer")
def test_gpu_no_access_out_of_bounds():
    """Every kernel's launches under NVIDIA's checker; PyTorch must not keep freed memory, which
    would hide a wrong address."""
    done = subprocess.run(
        ["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c",
         "import kernels.bench as b; b.check('cuda')"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
