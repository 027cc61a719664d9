"""The command line: its errors are one line with exit code 2, and asking for help loads nothing heavy."""

import subprocess
import sys

import pytest

from lightning_memopt import __version__
from lightning_memopt.cli import main


def _refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("steps", ["0", "-3", "many", "1.5"])
def test_a_number_of_steps_below_one_is_refused_in_one_line(capsys, steps):
    assert steps in _refusal(capsys, "demo", "--steps", steps)


def test_an_unknown_preset_is_refused_with_those_that_exist(capsys):
    said = _refusal(capsys, "demo", "--preset", "huge")
    assert "huge" in said and "tiny" in said and "small" in said


def test_an_unknown_technique_is_refused_with_those_that_exist(capsys):
    said = _refusal(capsys, "demo", "--techniques", "checkpointing,magic")
    assert "magic" in said and "micro-batching" in said


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_training(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    said = _refusal(capsys, "demo", "--out", str(file / "below"))
    assert str(file / "below") in said and "another folder" in said


def test_no_command_and_an_unknown_command_are_refused(capsys):
    assert "COMMAND" in _refusal(capsys)
    assert "demo" in _refusal(capsys, "train")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_ctrl_c_ends_with_a_line_instead_of_a_traceback(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_memopt.demo.command.run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "lightning-memopt: stopped\n"


def test_help_and_bad_options_load_neither_torch_nor_lightning():
    code = (
        "import sys\n"
        "from lightning_memopt.cli import main\n"
        "try: main(['demo', '--preset', 'huge'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'rich') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
