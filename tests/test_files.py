"""common/files.py: files that are whole or not there, and errors of one line."""
import pytest

from common import files


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
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    with pytest.raises(SystemExit):
        read()
    assert capsys.readouterr().err == ""
