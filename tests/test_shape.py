"""The shape that all scripts share, so that a diff of two shows their methods and nothing else."""
import ast
import re
from collections import defaultdict

import pytest

from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
# what is each method's own; whatever else two scripts have under one name is one text
METHOD = {"network", "walk", "objective", "sample", "denoise", "train", "main", "load", "check",
          "bound", "bits_per_dim", "few"}
BANNERS = ["Flags", "Notation", "The method", "Sample", "Train", "Main"]
NARROW = [path for folder in ("", "common/", "kernels/", "tests/")
          for path in sorted(ROOT.glob(f"{folder}*.py"))]


def test_a_function_of_one_name_is_one_text():
    texts = defaultdict(set)
    for script in SCRIPTS:
        source = script.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "Config":
                texts[node.name].add(ast.get_source_segment(source, node))
    assert METHOD & texts.keys() and not [
        name for name, versions in texts.items() if len(versions) > 1 and name not in METHOD]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_s_rooms_come_in_one_order(script):
    source = script.read_text()
    banners = re.findall(r"^# =+ (.+)$", source, re.M)
    assert [banner for banner in banners if banner in BANNERS] == BANNERS
    tree = ast.parse(source)
    head = ast.get_docstring(tree)
    for line in ("noising", "training", "sampling", f"python {script.name} --train"):
        assert re.search(rf"^ {{4}}{line} ", head, re.M), f"the head says nothing of {line}"
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)]
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert {"network", "sample", "denoise", "train", "load", "main"} <= {*names}


@pytest.mark.parametrize("kernel", ["noise", "diffuse", "group_norm"])
def test_a_kernel_s_rooms_come_in_one_order(kernel):
    source = (ROOT / "kernels" / f"{kernel}.py").read_text()
    rooms = ["Definition", "Triton", "Autograd", "Launch and checks"]
    found = re.findall(r"^# -+ (.+)$", source, re.M)
    assert found == [room for room in rooms if room in found]
    assert {"Definition", "Triton", "Launch and checks"} <= {*found}
    definition, rest = source.split("- Triton\n")
    assert "@triton.jit" not in definition and "@triton.jit" in rest
    public = {"noise": ["randn"], "diffuse": ["add_noise", "denoise_step"],
              "group_norm": ["group_norm_torch", "group_norm"]}[kernel]
    assert all(f"\ndef {name}(" in definition for name in public)


@pytest.mark.parametrize("path", NARROW, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_line_is_wider_than_100(path):
    lines = path.read_text().splitlines()
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]


def test_common_imports_no_script_and_only_the_networks_import_kernels():
    names = {script.stem for script in SCRIPTS}
    for path in ROOT.glob("common/*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree)
                    if isinstance(node, ast.Import) for alias in node.names}
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree)
                     if isinstance(node, ast.ImportFrom)}
        assert not imported & names, path
        if path.name != "unet.py":
            assert "kernels" not in imported, path
