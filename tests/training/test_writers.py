"""What is written about a run, by which writer, and what a writer that fails costs."""

import csv
import json
import sys
import types

import pytest

from posjax.training import writers
from posjax.training.writers import JsonLines, Writers, printed, read_metrics

LINES = {10: {"loss": 2.5, "skipped": 0}, 20: {"loss": None, "skipped": 1}, 30: {"loss": 1.5, "skipped": 1, "evaluation/loss": 3.0}}


def written(folder, loggers, lines=LINES, step=0):
    chosen = Writers(folder, step, loggers, {"dim": 8})
    for at, metrics in lines.items():
        chosen.write(at, metrics)
    chosen.close()


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_gets_columns_as_they_appear_and_forgets_what_a_resumed_run_repeats(tmp_path):
    written(tmp_path, ("csv",))
    assert [row["step"] for row in table(tmp_path)] == ["10", "20", "30"]
    assert [row["loss"] for row in table(tmp_path)] == ["2.5", "", "1.5"]
    assert [row["evaluation/loss"] for row in table(tmp_path)] == ["", "", "3.0"]
    written(tmp_path, ("csv",), {20: {"loss": 9.0}}, step=10)
    assert [(row["step"], row["loss"]) for row in table(tmp_path)] == [("10", "2.5"), ("20", "9.0")]
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]


def test_lines_are_strict_json(tmp_path):
    written(tmp_path, ())
    assert {line.pop("step"): line for line in read_metrics(tmp_path)} == LINES
    with pytest.raises(ValueError, match="Out of range float"):
        JsonLines(tmp_path, 30).write(40, {"loss": float("nan")})
    assert not list(tmp_path.glob("events*"))


def test_weights_and_biases_continues_its_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: calls.append(options) or Run()))
    monkeypatch.setattr(writers, "require", lambda *names: None)
    written(tmp_path, ("wandb",), {10: LINES[10], 20: LINES[20]})
    assert calls[0] == dict(dir=str(tmp_path), name=str(tmp_path), config={"dim": 8}, id=None, resume="allow")
    assert calls[1:] == [(10, {"loss": 2.5, "skipped": 0}), (20, {"skipped": 1}), "finished"]
    written(tmp_path, ("wandb",), {}, step=20)
    assert calls[-2]["id"] == "abc"


def test_a_logger_that_fails_costs_one_warning(tmp_path, monkeypatch):
    def full(self, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.TensorBoard, "write", full)
    with pytest.warns(UserWarning, match="tensorboard has failed .*No space left on device.*; training goes on") as warned:
        written(tmp_path, ("tensorboard", "csv"))
    assert len(warned) == 1
    assert len(read_metrics(tmp_path)) == len(table(tmp_path)) == 3


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path):
    lines = JsonLines(tmp_path, 0)
    real, lines._file = lines._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            lines.write(step, {"loss": 1.0})
    lines._file = real
    lines.write(3, {"loss": 1.0})
    lines.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_unknown_loggers(tmp_path):
    with pytest.raises(ValueError, match="loggers must be one of tensorboard, csv, wandb, got 'mlflow'"):
        Writers(tmp_path, 0, ("mlflow",))
    assert not list(tmp_path.iterdir())


def test_a_terminal_that_is_gone_is_no_error(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    printed("a line")
