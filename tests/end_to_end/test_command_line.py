"""The program as a user meets it: in a terminal, stopped by Ctrl-C, on two processes."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "train", "--model", "resnet8", "--width", "4", "--test", "0.5", "--batch-size", "64",
    "--threads", "1",
]  # fmt: skip


STARTED = []


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    while STARTED:
        STARTED.pop().kill()


def start(arguments, folder, **options):
    # A shell starts its background jobs with Ctrl-C ignored, and their children inherit it.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = subprocess.Popen(
        [sys.executable, "-m", "normdrop", *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    STARTED.append(process)
    return process


def test_a_run_from_the_first_to_the_last_line(tmp_path):
    process = start([*SMALL, "--epochs", "2"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    lines = out.splitlines()
    run = Path("runs/digits-resnet8-1")
    assert lines[0].startswith("digits: ")
    assert [line[:9] for line in lines[3:5]] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-3].startswith("Test accuracy ")
    assert lines[-2] == f"Report:  {run / 'report.html'}"
    assert lines[-1] == f"Again:   normdrop train --config {run / 'options.yaml'}"
    assert "\x1b" not in out
    assert (tmp_path / run / "report.html").is_file()


def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path):
    # More epochs than any machine ends before the signal comes.
    arguments = [*SMALL, "--epochs", "1000000", "--no-report"]
    process = start(arguments, tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    run = tmp_path / "runs" / "digits-resnet8-1"
    # An epoch is written down before the next one ends.
    assert any(line.split()[:2] == ["epoch", "2/1000000"] for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Stopped; the last whole epoch is kept. Go on with: normdrop train --resume runs" in err
    assert "Traceback" not in err
    process = start(["train", "--resume", str(run), "--max-time", "1s", "--no-report"], tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Test accuracy" in out
    assert (run / "result.json").exists()


def test_a_terminal_shows_a_bar_with_loss_accuracy_and_speed(tmp_path):
    own, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-m", "normdrop", *SMALL, "--epochs", "2", "--no-report"],
        cwd=tmp_path,
        stdout=other,
        stderr=other,
        env=environment,
    )
    os.close(other)
    shown = b""
    while True:
        ready, _, _ = select.select([own], [], [], 300)
        assert ready
        try:
            part = os.read(own, 65536)
        except OSError:  # The other end was closed.
            break
        if not part:
            break
        shown += part
    os.close(own)
    assert process.wait(timeout=300) == 0
    text = shown.decode()
    assert "━" in text
    bar = next(line for line in text.splitlines() if "━" in line and "accuracy" in line)
    assert "loss" in bar
    assert "images/s" in bar


def test_two_processes_share_every_batch(tmp_path):
    weights = []
    # 32 samples in a process and 16 channels: enough for the kernels.
    for number, memory in enumerate(("normal", "low"), 1):
        arguments = ["--epochs", "2", "--devices", "2", "--width", "16", "--memory", memory]
        process = start([*SMALL, *arguments, "--no-report"], tmp_path)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert err == ""
        assert out.count("epoch 1/2") == 1
        run = tmp_path / "runs" / f"digits-resnet8-{number}"
        metrics = (run / "metrics.csv").read_text().splitlines()
        # 809 samples in steps of 64, as for one process.
        assert [line.split(",")[1] for line in metrics[1:]] == ["13", "26"]
        assert json.loads((run / "result.json").read_text())["epochs"] == 2
        weights.append((run / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_two_processes_pass_on_one_sentence(tmp_path):
    process = start(
        [*SMALL, "--epochs", "2", "--devices", "2", "--learning-rate", "1e20"], tmp_path
    )
    _, err = process.communicate(timeout=400)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith("normdrop: The loss is nan in epoch 1")
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_comes_at_once(arguments, tmp_path):
    process = start(arguments, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert err == ""
    assert "usage: normdrop" in out
