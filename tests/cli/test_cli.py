"""The command line as a whole: exit codes, one-line errors, help."""

from __future__ import annotations

import errno
import subprocess
import sys
import warnings

import pytest

from svdk import cli
from svdk.errors import DataError, InputError


def failing(error):
    def run(args):
        raise error

    return run


@pytest.fixture
def run_info(monkeypatch, capsys):
    """Run ``svdk info`` with its body replaced."""

    def call(body, *flags):
        monkeypatch.setattr("svdk.cli.info.run", body)
        code = cli.main([*flags, "info"])
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("alpha was 2; allowed: [0, 1]"), "svdk info: error: alpha was 2; allowed: [0, 1]\n"),
        (DataError("row 3: no prompt"), "svdk info: error: row 3: no prompt\n"),
        (
            OSError(errno.ENOSPC, "No space left", "out.json"),
            "svdk info: error: disk full while writing out.json\n",
        ),
        (OSError(errno.EACCES, "Permission denied", "/x"), "svdk info: error: Permission denied: /x\n"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(run_info, error, message):
    assert run_info(failing(error)) == (2, message)


def test_an_interrupt_is_exit_code_130(run_info):
    assert run_info(failing(KeyboardInterrupt()))[0] == 130


def test_debug_shows_the_traceback(run_info):
    with pytest.raises(InputError, match="alpha"):
        run_info(failing(InputError("alpha")), "--debug")


def test_a_programming_error_is_not_swallowed(run_info):
    with pytest.raises(ZeroDivisionError):
        run_info(failing(ZeroDivisionError()))


def test_success_is_exit_code_0(run_info):
    assert run_info(lambda args: None) == (0, "")


def warning(args):
    for _ in range(2):
        warnings.warn("look\n out\u2028now", stacklevel=1)
    warnings.warn("`is_gradient_checkpointing` is old", FutureWarning, stacklevel=1)


def test_a_warning_is_one_line(run_info, monkeypatch):
    before = warnings.showwarning, warnings.filters[:]
    assert run_info(warning) == (0, "svdk: look out now\n")
    assert (warnings.showwarning, warnings.filters[:]) == before
    monkeypatch.setattr(warnings, "showwarning", lambda *a: print("as Python has it", file=sys.stderr))
    assert run_info(warning, "--debug") == (0, "as Python has it\n")
    monkeypatch.setenv("SVDK_DEBUG", "1")
    assert run_info(warning) == (0, "as Python has it\n")


def test_a_warning_before_an_error_is_shown(run_info):
    def body(args):
        warning(args)
        raise InputError("x")

    assert run_info(body) == (2, "svdk: look out now\nsvdk info: error: x\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    assert f"svdk {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["generate", "--no-such-option"]])
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert "usage: svdk" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_models():
    code = (
        "import sys; from svdk.cli import build_parser; build_parser(); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_info_lists_every_backend_with_its_reason(capsys):
    from svdk.ops import backends

    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for name, why in backends.status().items():
        assert name in shown
        assert why in shown
