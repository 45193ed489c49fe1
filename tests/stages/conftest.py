"""Fixtures of the tests of the command line."""

import json

import pytest

from stages.commands import in_process


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # boxes of messages do not wrap

    def run(*arguments):
        capsys.readouterr()
        status = in_process(*arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


@pytest.fixture
def as_json(command):
    """The JSON that a successful command wrote to stdout."""

    def run(*arguments):
        status, out, err = command(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return run
