"""The command line."""

import subprocess
import sys

import pytest

import pyrosc
from pyrosc.cli import command
from pyrosc.cli.command import main
from pyrosc.cli.demo import _OWN


def test_without_scanpy_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(SystemExit, match=r'pyrosc demo: .*pip install "pyrosc\[demo\]"') as error:
        main(["demo", "--output", str(tmp_path / "out")])
    assert isinstance(error.value.code, str)  # Python prints it and exits with 1
    assert not (tmp_path / "out").exists()


def test_arguments_reach_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "demo", lambda output, **more: calls.append((str(output), more)))
    main(["demo"])
    main(["demo", "--output", "there", "--epochs", "7", "--seed", "5"])
    main(["demo", "--smoke"])
    assert calls == [
        ("demo", {"epochs": None, "smoke": False, "seed": 0}),
        ("there", {"epochs": 7, "smoke": False, "seed": 5}),
        ("demo", {"epochs": 2, "smoke": True, "seed": 0}),
    ]


@pytest.mark.parametrize("wrong", [[], ["nonsense"], ["demo", "--epochs", "0"], ["demo", "--epochs", "two"]])
def test_wrong_arguments_are_explained(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        main(wrong)
    assert error.value.code == 2
    assert "usage: pyrosc" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "demo", interrupted)
    with pytest.raises(SystemExit) as error:
        main(["demo"])
    assert error.value.code == 130


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"pyrosc {pyrosc.__version__}\n"


def test_as_a_program_of_its_own(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-W", "error", "-m", "pyrosc", "demo", "--smoke", "--output", str(out)]
    how = {"check": False, "capture_output": True, "text": True, "cwd": tmp_path}
    run = subprocess.run(command, **how)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (out / "summary.txt").read_text()
    assert "1/4 fitting a VAE to 560 cells" in run.stderr
    assert "2/2 " in run.stderr  # a progress bar
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == _OWN - {"fit/"}

    (out / "mine.txt").write_text("mine")
    again = subprocess.run(command, **how)
    assert again.returncode == 1
    assert again.stderr.startswith("pyrosc demo: ")
    assert "Traceback" not in again.stderr
