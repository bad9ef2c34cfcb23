"""`moviola train --task recognition`: the group that is told its task, the options, the page about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moviola.cli.recognise import ByTask, recognise_command
from moviola.types import UsageError
from tests.verbs.test_recognise import CLASSES, clips, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return clips(tmp_path / "data", CLASSES, 2)


def command() -> typer.Typer:
    """`moviola train` as the commands put it together: a group that is told its task."""
    app = typer.Typer()
    train = typer.Typer(cls=ByTask)
    app.add_typer(train, name="train")
    app.callback()(lambda: None)

    @train.command("pairs")
    def pairs(data: list[str], to: Path = Path("x")) -> None:
        print("pairs", data, to)

    train.command("recognition")(recognise_command)
    return app


def test_the_command(folder: Path, tmp_path: Path) -> None:
    tiny().save(tmp_path / "base")
    words = (
        f"--to {tmp_path / 'run'} --init {tmp_path / 'base'} --objective clip --device cpu --json --steps 1"
    )
    run = [*words.split(), "--batch-size", "2"]
    more = ["--shots", "1", "--views", "1", "1", "--most-test", "2", "--frames", "1", "--set", "mixup=0"]
    for args in (["--task", "recognition", "--data", str(folder)], ["--task=recognition", str(folder)]):
        done = CliRunner().invoke(command(), ["train", *args, *run, *more])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["learned_from"], told["measured_on"]) == (3, 2)
        assert Path(told["model"]).is_dir()
    done = CliRunner().invoke(command(), ["train", "a.parquet", "b.parquet", "--to", "run"])
    assert done.stdout.startswith("pairs ['a.parquet', 'b.parquet'] run")
    shown = CliRunner().invoke(command(), ["train", "--task", "recognition", "--help"])
    assert "--base-to-new" in shown.output
    with pytest.raises(UsageError, match="no task 'flying'"):
        CliRunner().invoke(command(), ["train", "--task", "flying"], catch_exceptions=False)
    with pytest.raises(UsageError, match="Name the clips once"):
        CliRunner().invoke(command(), ["train", "--task", "recognition", *run], catch_exceptions=False)


def test_importing_the_command_is_cheap() -> None:
    code = "import sys, moviola.cli.recognise; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
