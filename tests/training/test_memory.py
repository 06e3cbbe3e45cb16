"""``normdrop train --memory low``: the same weights, and the option stands in the run."""

import json

import pytest
import yaml

import normdrop
from normdrop import cli
from normdrop.errors import UserError
from normdrop.memory import recompute
from normdrop.memory.low import is_saving_memory
from normdrop.runs.weights import load_network
from normdrop.training.fit import Stopped, train
from normdrop.training.task import Task

# Wide enough that the kernels compute the first stage, not torch's operator.
WIDE = {"width": 16, "epochs": 2}


@pytest.fixture
def again(monkeypatch):
    """A list that grows with every output that is computed again."""
    calls = []
    values = recompute.Output.values

    def counted(self):
        calls.append(self)
        return values(self)

    monkeypatch.setattr(recompute.Output, "values", counted)
    return calls


@pytest.mark.skipif(not normdrop.has_kernels(), reason="outputs of the kernel are computed again")
def test_a_run_with_low_memory_ends_with_the_same_weights(small, again, monkeypatch):
    plain = train(small(**WIDE))
    assert not again
    low = train(small(**WIDE, memory="low"))
    assert again
    weights = (plain / "weights.safetensors").read_bytes()
    assert (low / "weights.safetensors").read_bytes() == weights
    assert yaml.safe_load((low / "options.yaml").read_text())["memory"] == "low"
    assert json.loads((low / "run.json").read_text())["network"]["options"]["memory"] == "low"
    assert is_saving_memory(load_network(low)[0])

    step = Task.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 14:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", interrupted)
    with pytest.raises(Stopped):
        train(small(**WIDE, memory="low", name="stopped"))
    monkeypatch.setattr(Task, "training_step", step)
    again.clear()
    stopped = low.parent / "stopped"
    assert train(resume=stopped) == stopped
    assert again
    assert (stopped / "weights.safetensors").read_bytes() == weights


def test_another_word_is_refused(small, capsys):
    with pytest.raises(UserError, match=r"Expected `memory` to be .* but got 'tiny'"):
        train(small(memory="tiny"))
    assert cli.main(["train", "--memory", "tiny"]) == 2
    assert "Expected --memory to be normal or low, but got 'tiny'" in capsys.readouterr().err
