"""Runs the command line inside the process of a test."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from everysat import cli


def everysat(*arguments: Any) -> str:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if done.exception is not None:
        raise done.exception
    assert done.exit_code == 0
    return done.output


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> str:
    """The one line on standard error."""
    monkeypatch.setattr("sys.argv", ["everysat", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said
