"""Fixtures of the command line: a tiny model, an empty folder with a text, and a run in this process."""

import pytest
from checkpoints import TEXT, save_checkpoint

from fastheads.cli.commands import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run
