"""common/files.py: files that are whole or not there, locks, damage, and errors of one line."""
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from common import files
from conftest import ROOT


def test_written_is_all_or_nothing(tmp_path):
    path = tmp_path / "a" / "file"
    with files.written(path) as file:
        file.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with files.written(path) as file:
            file.write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_program_ends_with_one_line_and_python_gets_an_error(monkeypatch, capsys):
    def read():
        with files.inputs():
            raise OSError("no\n such   file")
    with pytest.raises(OSError, match="such"):
        read()
    with pytest.raises(ValueError, match="^give a folder$"):
        files.stop("give a\nfolder")
    monkeypatch.setattr(files, "program", "ddpm.py")
    for wrong in (read, lambda: files.stop("no such file")):
        with pytest.raises(SystemExit) as stopped:
            wrong()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "ddpm.py: error: no such file\n"
    # of several processes the first speaks; another one only where it is not ended meanwhile
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        read()
    assert capsys.readouterr().err == "ddpm.py: error: process 1: no such file\n"
    assert waited == [files.OTHERS_WAIT]


def test_written_says_the_first_fault(tmp_path, monkeypatch):
    """On a disk that became read-only the temporary file cannot be removed either."""
    def full(*given):
        raise OSError(28, "No space left on device")

    def read_only(*given, **more):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(files.os, "replace", full)
    monkeypatch.setattr(files.Path, "unlink", read_only)
    with pytest.raises(OSError, match="a.json cannot be written: .*No space left"):
        with files.written(tmp_path / "a.json") as file:
            file.write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/b/a.json cannot be written"):
        with files.written(tmp_path / "file" / "b" / "a.json") as file:
            file.write_text("{}")


# -------------------------------------------------------------------------------------------- locks
OTHER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from common import files
try:
    files.lock(sys.argv[1])
except ValueError as fault:
    print(fault); sys.exit(2)
print("locked", flush=True)
sys.stdin.read()
"""


def other(folder, **more):
    """A process that locks the folder, and keeps it until its stdin is closed."""
    return subprocess.Popen([sys.executable, "-c", OTHER, str(folder)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more)


def test_a_lock_keeps_others_out_and_a_killed_one_leaves_none(tmp_path):
    first = other(tmp_path / "run")
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process trains in .*run: wait for it, or"):
            files.lock(tmp_path / "run")
        files.lock(tmp_path / "elsewhere")
    finally:
        first.kill()
        first.communicate()
    files.lock(tmp_path / "run")
    files.lock(tmp_path / "run")  # its own is no other one
    said, _ = other(tmp_path / "run").communicate()
    assert said.startswith("another process trains in")
    files.unlock()
    said, _ = other(tmp_path / "run").communicate()
    assert said == "locked\n"


# ------------------------------------------------------------------------------------------- damage
def test_damage_is_found_that_pytorch_does_not_see(tmp_path):
    """A hundred files with twenty bytes of each changed."""
    whole = tmp_path / "whole.pt"
    torch.save(dict(weights=torch.randn(30_000), step=3), whole)
    content, unseen = whole.read_bytes(), 0
    assert files.unpickled(whole)["step"] == 3
    for seed in range(100):
        rng = np.random.default_rng(seed)
        damaged = np.frombuffer(content, np.uint8).copy()
        places = rng.choice(len(damaged), 20, replace=False)
        damaged[places] ^= rng.integers(1, 256, 20, dtype=np.uint8)
        path = tmp_path / f"{seed}.pt"
        path.write_bytes(damaged.tobytes())
        try:
            torch.load(path, weights_only=True)
            unseen += 1
        except Exception:
            pass
        with pytest.raises(Exception):
            files.unpickled(path)
    assert unseen > 50  # else there would be no need for it


@pytest.mark.skipif(os.name == "nt" or not os.getuid(), reason="root may read everything")
def test_what_may_not_be_read_is_not_called_damaged(tmp_path):
    torch.save(dict(step=1), tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0)
    with pytest.raises(ValueError, match="a.pt cannot be read: Permission denied"):
        files.load_checkpoint(tmp_path / "a.pt", ("ddpm",))


def test_too_little_memory_is_not_called_damage(tmp_path, monkeypatch):
    def full(*given, **more):
        raise MemoryError
    torch.save(dict(step=1), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        files.load_checkpoint(tmp_path / "a.pt", ("ddpm",))


@pytest.mark.parametrize("how", ("packed", "twice", "no zip", "a folder", "a pipe"))
def test_what_is_no_file_of_ours_is_not_read(how, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    torch.save(dict(w=torch.zeros(1000)), path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    if how in ("packed", "twice"):
        kind = zipfile.ZIP_DEFLATED if how == "packed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
                if how == "twice" and name.endswith("data/0"):
                    with pytest.warns(UserWarning, match="Duplicate name"):
                        archive.writestr(name, content)
    elif how == "no zip":
        torch.save(dict(w=torch.zeros(9)), path, _use_new_zipfile_serialization=False)
    else:
        path.unlink()
        os.mkfifo(path) if how == "a pipe" else path.mkdir()
    if how in ("packed", "no zip"):
        torch.load(path, weights_only=True)  # which it would be
    monkeypatch.setattr(torch, "load", lambda *given, **more: pytest.fail("it was read"))
    with pytest.raises((ValueError, zipfile.BadZipFile, OSError)):
        files.unpickled(path)
    with pytest.raises(ValueError, match="is not a checkpoint of this project, or is damaged"):
        files.load_checkpoint(path, ("ddpm",))
    with pytest.raises(FileNotFoundError):
        files.unpickled(tmp_path / "none.pt")


def nest(depth):
    """A list of 2^depth lists, which a pickle holds in a few bytes: to print it takes for ever."""
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize("change", [
    dict(step=-1), dict(step=2.5), dict(step=True), dict(step="1"), dict(step=10 ** 400),
    dict(seconds=float("nan")), dict(seconds="x"), dict(seconds=-1.0), dict(seconds=None),
    dict(source=3), dict(method=["ddpm"]), dict(script=3), dict(threads=-1), dict(threads=1 << 40),
    dict(config=dict(T=nest(60))), dict(config={3: 4}), dict(config=[1]), dict(config=dict(T={})),
    dict(config=dict(T=1 << 200)), dict(data=dict(shape=[1, 0, 4])), dict(data=dict(shape=[1, 4])),
    dict(data=dict(classes=[1])), dict(data=dict(classes=nest(60))), dict(data=dict(classes=None)),
    dict(data=dict(longest=1 << 30)), dict(data=dict(content=nest(60))),
    dict(data=dict(content=dict(smallest=nest(60)))), "seconds", "source", "config", "data"],
    ids=lambda change: change if isinstance(change, str) else "-".join(change))
def test_an_odd_or_missing_field_is_one_line(change, tmp_path):
    data = dict(data="digits", shape=[1, 4, 4], classes=["a", "b"])
    saved = dict(method="ddpm", config=dict(T=5), data=data, source="digits", step=1, seconds=2.0)
    torch.save(saved, tmp_path / "a.pt")
    assert files.load_checkpoint(tmp_path / "a.pt", ("ddpm",))["step"] == 1
    if isinstance(change, str):
        del saved[change]
    elif "data" in change:
        saved["data"] = data | change["data"]
    else:
        saved |= change
    torch.save(saved, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project, or is damaged"):
        files.load_checkpoint(tmp_path / "b.pt", ("ddpm",))


def test_a_checkpoint_that_was_read_for_its_settings_is_read_once(tmp_path, monkeypatch):
    """What is kept is handed over once, of the file as it was then, and of no other."""
    data = dict(data="digits", shape=[1, 4, 4], classes=["a", "b"])
    saved = dict(method="ddpm", config=dict(T=5), data=data, source="digits", step=1, seconds=2.0)
    path, reads, read = tmp_path / "a.pt", [], files.unpickled
    torch.save(saved, path)
    torch.save(saved | dict(step=2), tmp_path / "b.pt")
    monkeypatch.setattr(files, "unpickled", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(files, "_kept", {})
    first = files.load_checkpoint(path, ("ddpm",), keep=True)
    assert files.load_checkpoint(str(path), ("ddpm",)) is first and len(reads) == 1
    assert files.load_checkpoint(path, ("ddpm",)) is not first  # who has it may have changed it
    files.load_checkpoint(path, ("ddpm",), keep=True)
    assert files.load_checkpoint(tmp_path / "b.pt", ("ddpm",))["step"] == 2
    files.load_checkpoint(path, ("ddpm",), keep=True)
    torch.save(saved | dict(step=3), path)
    assert files.load_checkpoint(path, ("ddpm",))["step"] == 3
    files.load_checkpoint(path, ("ddpm",), keep=True)
    path.unlink()
    with pytest.raises(ValueError, match="a.pt is not there"):
        files.load_checkpoint(path, ("ddpm",))
