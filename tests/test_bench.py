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


def test_columns_of_others_and_of_held_tiles(bench, monkeypatch, tmp_path, capfd):
    """gnnhwc as its callers meet it, in plain PyTorch; then where its CUDA code does not build."""
    package = tmp_path / "gnnhwc"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "custom_gn.py").write_text(
        "import torch.nn.functional as F\n\n\n"
        "class GN_NHWC_Func:\n"
        "    def apply(x, weight, bias, groups, eps, activation):\n"
        "        assert weight.dtype == bias.dtype == x.dtype and activation in (0, 2)\n"
        "        y = F.group_norm(x, groups, weight, bias, eps)\n"
        "        return F.silu(y) if activation else y\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench.group_norm, "triton", pytest.importorskip("triton"))
    monkeypatch.setattr(bench.group_norm, "CHUNK", 16)
    monkeypatch.setattr(bench.group_norm, "STEP", 16)
    clock = bench.Clock("cpu", repeats=1)

    def rows():
        return [*bench.norm_rows(clock, 1.0, [torch.bfloat16], ["tiny"], compiled=False)]

    found = rows()
    for row in found:
        wanted = "last" in row["name"] and "scale" not in row["name"]
        assert ("gnnhwc" in row) == wanted and math.isfinite(row.get("gnnhwc", 0)), row
    assert {"backward" in row["name"] for row in found if "held" in row} == {True}
    (package / "custom_gn.py").write_text("raise RuntimeError('no nvcc')\n")
    monkeypatch.delitem(sys.modules, "gnnhwc.custom_gn")
    assert not any("gnnhwc" in row for row in rows())
    assert "no column of gnnhwc: RuntimeError no nvcc" in capfd.readouterr().err


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
