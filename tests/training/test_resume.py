"""A run that was stopped goes on, and ends with the weights of one that was not, bit for bit."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from normdrop.errors import UserError
from normdrop.runs import write
from normdrop.runs.options import Options
from normdrop.runs.weights import load_checkpoint, load_network
from normdrop.training.fit import Stopped, train
from normdrop.training.task import Task


@pytest.fixture
def stop_at(monkeypatch):
    """Let Ctrl-C come in a certain step."""

    def arm(step):
        original = Task.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == step:
                raise KeyboardInterrupt
            return original(self, batch, batch_idx)

        monkeypatch.setattr(Task, "training_step", training_step)
        return lambda: monkeypatch.setattr(Task, "training_step", original)

    return arm


def rows(run):
    """The rows of metrics.csv but for their times."""
    with (run / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in csv.DictReader(file)
        ]


def assert_same_end(run, other):
    assert (run / "weights.safetensors").read_bytes() == (
        other / "weights.safetensors"
    ).read_bytes()
    assert rows(run) == rows(other)
    for name in ("last.ckpt", "best.ckpt"):
        one, two = (
            torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (run, other)
        )
        assert one["state_dict"].keys() == two["state_dict"].keys()
        for key, value in one["state_dict"].items():
            assert torch.equal(value, two["state_dict"][key]), key
        for key, value in one["averaged"].items():
            assert torch.equal(value, two["averaged"][key]), key
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (run, other))
    for key in ("accuracy", "loss", "confusion", "best_epoch", "epochs"):
        assert one[key] == two[key]


# 719 samples are trained on, 64 a step: 12 steps an epoch.
@pytest.mark.parametrize(
    ("step", "average"),
    [(0, 0.0), (12, 0.9), (17, 0.0), (17, 0.9), (35, 0.0)],
    ids=["first step", "epoch begins", "within", "within, averaged", "last step"],
)
def test_a_stopped_run_ends_with_the_same_bits(small, whole_run, stop_at, step, average):
    whole = whole_run(average)
    release = stop_at(step)
    with pytest.raises(Stopped, match=r"Go on with: normdrop train --resume .*stopped"):
        train(small(name="stopped", average=average))
    release()
    stopped = Path(small().run.runs_dir) / "stopped"
    assert not (stopped / "result.json").exists()
    assert (stopped / "checkpoints" / "last.ckpt").exists() == (step >= 12)
    assert train(resume=stopped) == stopped
    assert_same_end(stopped, whole)


def test_a_run_stopped_twice_ends_with_the_same_bits(small, stop_at):
    whole = train(small(name="whole", augment="shift"))
    release = stop_at(14)
    with pytest.raises(Stopped):
        train(small(name="stopped", augment="shift"))
    release()
    release = stop_at(27)
    with pytest.raises(Stopped):
        train(resume=whole.parent / "stopped")
    release()
    assert_same_end(train(resume=whole.parent / "stopped"), whole)


# Runs the command, which the kernel ends in a certain step; nothing is written or said any more.
KILLED = """
import os, signal, sys
from normdrop import cli
from normdrop.training.task import Task

def training_step(task, batch, number, original=Task.training_step):
    if task.global_step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(task, batch, number)

Task.training_step = training_step
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_ends_with_the_same_bits(small, finished_run, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump(small(name="killed").flat()))
    command = [sys.executable, "-c", KILLED, "train", "--config", str(options)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    killed = Path(small().run.runs_dir) / "killed"
    assert not (killed / "result.json").exists()
    assert_same_end(train(resume=killed), finished_run)


def test_a_run_killed_after_its_last_epoch_is_tested_on_resume(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("result.json", "weights.safetensors", "evaluation.safetensors"):
        (run / name).unlink()
    (run / "checkpoints" / ".last.ckpt.x7.part").write_text("half a checkpoint")
    assert_same_end(train(resume=run), finished_run)
    assert not list(run.rglob("*.part"))


def test_a_run_killed_between_its_two_checkpoints_ends_with_the_same_bits(
    small, finished_run, monkeypatch
):
    copies = []

    def copyfile(source, target):
        copies.append(source)
        if len(copies) == 2:
            raise KeyboardInterrupt
        return original(source, target)

    original = write.shutil.copyfile
    monkeypatch.setattr(write.shutil, "copyfile", copyfile)
    with pytest.raises(Stopped):
        train(small(name="stopped"))
    monkeypatch.undo()
    stopped = Path(small().run.runs_dir) / "stopped"
    best, last = (
        torch.load(stopped / "checkpoints" / name, weights_only=True)["callbacks"]["Record"]["rows"]
        for name in ("best.ckpt", "last.ckpt")
    )
    assert len(best) > len(last)
    assert_same_end(train(resume=stopped), finished_run)


def test_rows_after_the_checkpoint_are_forgotten(small, stop_at):
    release = stop_at(17)
    with pytest.raises(Stopped):
        train(small(name="run"))
    release()
    run = Path(small().run.runs_dir) / "run"
    with (run / "metrics.csv").open("a") as file:
        file.write("2,24,0.1,0,0,0,0,0,0\n")
    train(resume=run)
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]


class Writes:
    """What a pickle may hold: unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_checkpoint_that_would_run_code_is_refused(finished_run, tmp_path, name):
    run = unfinished(finished_run, tmp_path)
    path, made = run / "checkpoints" / name, tmp_path / "made"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"more": Writes(made)}, path)
    torch.load(path, weights_only=False)
    assert made.exists(), "this pickle does nothing"
    made.unlink()
    with pytest.raises(UserError, match=rf"Cannot read .*{name}"):
        train(resume=run)
    with pytest.raises(UserError, match=rf"Cannot read .*{name}"):
        load_checkpoint(path, load_network(finished_run)[0])
    assert not made.exists()


def test_a_finished_run_is_not_resumed(finished_run):
    with pytest.raises(UserError, match=r"is finished; train again with: normdrop train --config"):
        train(resume=finished_run)


def test_a_folder_that_is_no_run_is_not_resumed(tmp_path):
    with pytest.raises(UserError, match=r"Expected a run folder, but .* has no options.yaml"):
        train(resume=tmp_path)
    with pytest.raises(UserError, match=r"Expected a run folder, but .*nowhere is not there"):
        train(resume=tmp_path / "nowhere")


def unfinished(finished_run, folder):
    run = shutil.copytree(finished_run, folder / "run")
    (run / "result.json").unlink()
    return run


def test_a_resumed_run_keeps_its_options(finished_run, tmp_path):
    run = unfinished(finished_run, tmp_path)
    with pytest.raises(UserError, match=r"epochs is 3, but got 5; leave out --epochs"):
        train(Options.from_flat({"epochs": 5}), resume=run)
    train(Options.from_flat({"epochs": 3, "max_time": "1h"}), resume=run)


def test_a_resumed_run_keeps_its_name(finished_run, tmp_path):
    run = unfinished(finished_run, tmp_path)
    with pytest.raises(UserError, match=r"keeps its folder, .*run; leave out --name, or start a"):
        train(Options.from_flat({"name": "other"}), resume=run)
    assert train(Options.from_flat({"name": "run"}), resume=run) == run


def test_ctrl_c_before_the_first_step_says_how_to_go_on(small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("normdrop.training.fit.Task", interrupted)
    with pytest.raises(Stopped, match=r"no epoch was whole yet. Go on with: .* --resume .*early"):
        train(small(name="early"))


def test_changed_data_are_noticed(finished_run, tmp_path):
    run = unfinished(finished_run, tmp_path)
    record = json.loads((run / "run.json").read_text())
    record["digest"] = "another"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"The data changed since the run"):
        train(resume=run)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.98])
def test_a_checkpoint_that_was_cut_off_is_named(finished_run, tmp_path, keep):
    run = unfinished(finished_run, tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"Cannot read .*last.ckpt .*cut off"):
        train(resume=run)


def test_a_checkpoint_of_another_network_is_named(finished_run, small, tmp_path):
    other = train(small(name="other", epochs=1, width=8))
    run = unfinished(finished_run, tmp_path)
    shutil.copy(other / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt")
    with pytest.raises(
        UserError,
        match=r"last.ckpt belongs to another network: conv1.weight should have shape "
        r"\(4, 1, 3, 3\), not \(8, 1, 3, 3\).*and \d+ more",
    ):
        train(resume=run)


def test_a_checkpoint_that_is_none_is_named(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"no checkpoint of a run"):
        load_checkpoint(tmp_path / "last.ckpt", torch.nn.Linear(1, 1))
