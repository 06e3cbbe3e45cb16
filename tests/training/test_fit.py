"""A run from options to folder: names, limits, what is written, what goes wrong."""

import csv
import errno
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from normdrop import cli
from normdrop.errors import Diverged, UserError
from normdrop.report.report import write_report
from normdrop.runs import write
from normdrop.runs.weights import load_network
from normdrop.training.evaluate import evaluate
from normdrop.training.fit import train
from normdrop.training.task import Task


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_runs_are_numbered(small):
    first = train(small(epochs=1))
    second = train(small(epochs=1))
    assert [run.name for run in (first, second)] == ["digits-resnet8-1", "digits-resnet8-2"]


def test_options_yaml_runs_it_again(finished_run, tmp_path, capsys):
    options = finished_run / "options.yaml"
    assert "name" not in yaml.safe_load(options.read_text())
    arguments = ["train", "--config", str(options), "--runs-dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    again = tmp_path / "digits-resnet8-1"
    assert (again / "weights.safetensors").read_bytes() == (
        finished_run / "weights.safetensors"
    ).read_bytes()
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith("Test accuracy ")
    assert last[1] == f"Results: {again}"
    assert last[2] == f"Again:   normdrop train --config {again / 'options.yaml'}"


def test_another_seed_gives_another_network(small, finished_run):
    other = train(small(seed=1))
    assert (other / "weights.safetensors").read_bytes() != (
        finished_run / "weights.safetensors"
    ).read_bytes()


def test_a_name_that_exists_is_refused(small, finished_run, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    with pytest.raises(UserError, match=r"exists; go on with it by --resume .*or choose another"):
        train(small(name="taken"))


def test_a_runs_dir_that_cannot_be_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot make a run folder in"):
        train(small(runs_dir=str(tmp_path / "file" / "runs")))


@pytest.fixture
def bfloat16_instructions(monkeypatch):
    """Let the processor have instructions for bfloat16, or not."""

    def have(are_there):
        flags = {"architecture": "x86_64", "avx512_bf16": are_there, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)

    return have


@pytest.mark.filterwarnings("always:this processor has no")
def test_bfloat16_without_instructions_for_it_is_said_before_the_run(
    bfloat16_instructions, tmp_path, monkeypatch, capsys
):
    bfloat16_instructions(False)
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(
        "normdrop.training.fit._announce", lambda *_: shown.append(capsys.readouterr())
    )
    monkeypatch.setattr("normdrop.training.fit._fit", lambda *_: None)
    monkeypatch.setattr("normdrop.training.show.conclude", lambda _: None)
    assert cli.main(["train", "--precision", "bfloat16", "--no-report"]) == 0
    assert shown[0].err == (
        "normdrop: warning: this processor has no instructions for bfloat16, which makes training "
        "8 to 24 times slower than in float32; leave out --precision bfloat16\n"
    )
    assert cli.main(["train", "--no-report"]) == 0
    bfloat16_instructions(True)
    assert cli.main(["train", "--precision", "bfloat16", "--no-report"]) == 0
    assert [said.err for said in shown[1:]] == ["", ""]


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_precision(small, precision, bfloat16_instructions):
    bfloat16_instructions(True)
    run = train(small(epochs=1, precision=precision))
    weights = load_network(run)[0].fc.weight
    assert weights.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert evaluate(run)["accuracy"] == json.loads((run / "result.json").read_text())["accuracy"]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"norm": False}, []),
        ({"norm": False, "input_norm": True}, ["input_norm"]),
        ({"norm": False, "input_norm": False}, []),
        ({"input_norm": False}, ["bn1"]),
        ({}, ["input_norm"]),
    ],
)
def test_networks_without_norm(small, options, first):
    run = train(small(epochs=1, learning_rate=0.02, **options))
    norms = json.loads((run / "run.json").read_text())["norm_layers"]
    assert [layer["name"] for layer in norms][:1] == first
    assert len(norms) <= 1 or "norm" not in options
    network = load_network(run)[0]
    found = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(found) == len(norms)


def test_the_time_limit_ends_the_run_and_the_schedule(small, monkeypatch):
    # The clock is turned: a step takes 10 s. The 31st step is one of learning rate zero.
    monkeypatch.setattr(Task, "elapsed", property(lambda self: 10.0 * self.global_step))
    run = train(small(epochs=50, max_time="300s"))
    (row,) = rows(run)[-1:]
    assert int(row["step"]) == 31
    assert int(row["epoch"]) == 3
    assert float(row["learning_rate"]) == pytest.approx(0, abs=1e-3)
    assert json.loads((run / "result.json").read_text())["epochs"] == 3


def test_a_run_at_its_time_limit_can_be_finished_later(small, monkeypatch):
    monkeypatch.setattr(Task, "elapsed", property(lambda self: 10.0 * self.global_step))
    run = train(small(epochs=50, max_time="300s"))
    weights = (run / "weights.safetensors").read_bytes()
    (run / "result.json").unlink()
    assert train(resume=run) == run
    assert len(rows(run)) >= 3
    assert (run / "result.json").exists()
    assert weights


def test_a_last_batch_of_one_is_merged_into_the_one_before(small):
    # 719 samples: batches of 359 and 360.
    run = train(small(epochs=1, batch_size=359))
    assert int(rows(run)[0]["step"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_named(small):
    with pytest.raises(UserError, match="There is no GPU that torch can use"):
        train(small(accelerator="gpu"))


def test_the_callers_generator_is_left_alone(small):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(small(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_relative_path_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("x,target\n" + "0.1,a\n0.9,b\n" * 30)
    arguments = ["train", "--data", "a.csv", "--epochs", "1", "--no-report"]
    assert cli.main([*arguments, "--batch-size", "8", "--name", "my run"]) == 0
    run = tmp_path / "runs" / "my run"
    assert yaml.safe_load((run / "options.yaml").read_text())["data"] == str(tmp_path / "a.csv")
    command = json.loads((run / "result.json").read_text())["command"]
    assert command == "normdrop train --config 'runs/my run/options.yaml'"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate(run)["count"] == 12


def test_a_loss_that_is_not_finite_stops_the_run(small):
    with pytest.raises(UserError, match="The loss is nan in epoch 1; train again with a lower"):
        train(small(learning_rate=1e20))


def test_a_network_beyond_the_memory_is_named(small, monkeypatch):
    def build(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 TB")

    monkeypatch.setattr("normdrop.runs.network.networks.build", build)
    with pytest.raises(UserError, match="The network resnet8 does not fit into memory; choose a"):
        train(small())


def weights_of(run):
    return safetensors.torch.load_file(run / "weights.safetensors")


@pytest.mark.parametrize("learning_rate", [1e20, 1e30])
def test_a_run_that_diverges_at_once_leaves_a_result_that_says_so(
    tmp_path, monkeypatch, capsys, learning_rate
):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "resnet8", "--width", "4", "--threads", "1", "--epochs", "2"]
    command = ["train", *arguments, "--learning-rate", str(learning_rate), "--name", "x"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("normdrop: The")
    assert said.endswith("in epoch 1; train again with a lower --learning-rate\n")
    result = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())
    assert (result["diverged"], result["epochs"], result["best_epoch"]) == (1, 1, 0)
    assert "accuracy" not in result
    assert "This run diverged: in epoch 1" in (tmp_path / "runs" / "x" / "report.html").read_text()
    assert cli.main(["evaluate", "runs/x"]) == 2
    assert "diverged in epoch 1 and left no weights" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "runs/x"]) == 2
    assert "is finished; train again" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["weight", "validation loss"])
def test_a_run_that_diverges_later_is_tested_with_its_best_epoch(
    small, monkeypatch, finished_run, where
):
    epoch_end = Task.on_validation_epoch_end

    def poisoned(task):
        epoch_end(task)
        if task.current_epoch == 1:
            if where == "weight":
                task.network.fc.weight.data[0, 0] = math.inf
            else:
                task.row["val_loss"] = math.nan

    monkeypatch.setattr(Task, "on_validation_epoch_end", poisoned)
    with pytest.raises(Diverged, match=rf"{where} is n.* epoch 2; the weights of epoch 1 are kept"):
        train(small(name="x"))
    run = Path(small().run.runs_dir) / "x"
    result = json.loads((run / "result.json").read_text())
    assert (result["diverged"], result["epochs"], result["best_epoch"]) == (2, 2, 1)
    assert all(value.isfinite().all() for value in weights_of(run).values())
    assert evaluate(run)["accuracy"] == result["accuracy"]
    page = write_report(run).read_text()
    assert "This run diverged: in epoch 2" in page
    assert "the test and the weights are those of epoch 1" in page
    # A run that was killed before its result says the same.
    (run / "result.json").unlink()
    with pytest.raises(Diverged, match="epoch 2"):
        train(resume=run)


def test_lightning_is_silent(small, capfd, recwarn):
    train(small(epochs=1))
    shown = capfd.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0].startswith("digits: 719 training, 180 validation and 898 test samples")
    assert lines[3].startswith("epoch 1/1  loss ")
    assert len(lines) == 4
    assert [str(w.message) for w in recwarn] == []


class TestNoRoom:
    """A full disk or a folder that cannot be written: one sentence, and no checkpoint is lost."""

    @pytest.fixture
    def fill(self, monkeypatch):
        """Let writing fail from a certain epoch on."""

        def arm(epoch, code=errno.ENOSPC):
            original = write.write_atomically

            def write_atomically(path):
                if self.epoch >= epoch:
                    raise OSError(code, "No space left on device", str(path))
                return original(path)

            monkeypatch.setattr(write, "write_atomically", write_atomically)
            start = Task.on_train_epoch_start

            def on_train_epoch_start(task):
                self.epoch = task.current_epoch + 1
                start(task)

            monkeypatch.setattr(Task, "on_train_epoch_start", on_train_epoch_start)
            return monkeypatch.undo

        return arm

    def test_in_a_later_epoch(self, small, fill, finished_run):
        undo = fill(2)
        with pytest.raises(
            UserError, match=r"Cannot write to .*full \(No space left on device\).*--resume .*full"
        ):
            train(small(name="full"))
        undo()
        full = Path(small().run.runs_dir) / "full"
        last = torch.load(full / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["callbacks"]["Record"]["rows"][-1]["epoch"] == 1
        assert not list(full.rglob("*.part"))
        # With room again, the run ends as if nothing had been.
        train(resume=full)
        assert (full / "weights.safetensors").read_bytes() == (
            finished_run / "weights.safetensors"
        ).read_bytes()

    def test_in_the_first_epoch(self, small, fill):
        fill(1)
        with pytest.raises(UserError, match=r"then start again with: normdrop train --resume"):
            train(small(name="full"))

    def test_while_the_checkpoint_is_written(self, small, monkeypatch, finished_run):
        # The disk fills up in the middle of the second checkpoint.
        written = []

        class Half(type(Path())):
            def write_bytes(self, data):
                written.append(self)
                if len(written) == 3:
                    super().write_bytes(bytes(data)[: len(data) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write_bytes(data)

        original = write.write_atomically
        import contextlib

        @contextlib.contextmanager
        def write_atomically(path):
            with original(path) as temporary:
                yield Half(temporary)

        monkeypatch.setattr(write, "write_atomically", write_atomically)
        with pytest.raises(UserError, match="No space left on device"):
            train(small(name="full", epochs=5))
        full = Path(small().run.runs_dir) / "full"
        torch.load(full / "checkpoints" / "last.ckpt", weights_only=True)
        assert not list(full.rglob("*.part"))

    def test_when_the_folder_is_made(self, small, monkeypatch):
        def write_text(path, text):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(write, "write_text", write_text)
        with pytest.raises(UserError, match=r"Read-only file system\); choose another folder"):
            train(small(name="read-only"))

    def test_when_the_result_is_written(self, small, monkeypatch):
        def write_tensors(path, tensors):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(write, "_write_tensors", write_tensors)
        with pytest.raises(UserError, match="No space left on device"):
            train(small(name="full", epochs=1))
        monkeypatch.undo()
        full = Path(small().run.runs_dir) / "full"
        assert (train(resume=full) / "result.json").exists()
