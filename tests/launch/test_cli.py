"""Dispatch and exit codes of the `kinodit` command."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import kinodit
from kinodit.launch import cli
from kinodit.models.errors import ConfigError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Replace the table of commands by one command, `try`, that does what it is given."""

    def install(action: Callable[[], int]) -> None:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--count", type=int, default=0)

        def run(args: argparse.Namespace) -> int:
            count: int = args.count
            return action() + count

        module = ModuleType("kinodit.launch.commands.try")
        vars(module).update(HELP="Try.", add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", {"try": "try something"})

    return install


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_is_answered_without_torch() -> None:
    done = run_python(
        "import sys\nfrom kinodit.launch.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(sorted({'torch', 'numpy', 'omegaconf', 'jinja2'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for name, summary in cli.COMMANDS.items():
        assert name in done.stdout and summary in done.stdout


def test_the_module_and_the_command_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kinodit", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"kinodit {kinodit.__version__}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_is_there(name: str) -> None:
    module = importlib.import_module(f"kinodit.launch.commands.{name}")
    assert module.HELP.endswith(".")
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0


def test_a_command_s_exit_code_is_the_process_s(
    command: Callable[[Callable[[], int]], None],
) -> None:
    command(lambda: 3)
    assert cli.main(["try"]) == 3
    assert cli.main(["try", "--count", "4"]) == 7


def test_what_the_user_can_change_is_one_line_and_exit_code_2(
    command: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> int:
        raise ConfigError("run.steps=0: must be at least 1")

    command(action)
    assert cli.main(["try"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: run.steps=0: must be at least 1\n")


def test_a_full_disk_is_one_line(
    command: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")

    command(action)
    assert cli.main(["try"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error
    assert "runs/a/metrics.jsonl" in error and "free some space" in error


def test_an_interrupt_is_exit_code_130(
    command: Callable[[Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def action() -> int:
        raise KeyboardInterrupt

    command(action)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_traceback(command: Callable[[Callable[[], int]], None]) -> None:
    def action() -> int:
        raise ValueError("not the user's")

    command(action)
    with pytest.raises(ValueError, match="not the user's"):
        cli.main(["try"])


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--colour"]])
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: kinodit" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = (
        "import sys, types\nfrom kinodit.launch import cli\n"
        "def run(args):\n    for i in range(100000): print('line', i)\n    return 0\n"
        "module = types.ModuleType('kinodit.launch.commands.many')\n"
        "module.HELP = 'x'; module.add_arguments = lambda parser: None; module.run = run\n"
        "sys.modules[module.__name__] = module\ncli.COMMANDS = {'many': 'x'}\n"
        "sys.exit(cli.main(['many']))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None and writer.stderr is not None
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait(timeout=20) == 141
    writer.stderr.close()
