"""The command line: help, flags, and one sentence for everything that is wrong."""

import json
import subprocess
import sys

import pytest

from normdrop import cli
from normdrop.flags import parse
from normdrop.runs.options import (
    DataOptions,
    NetworkOptions,
    Options,
    RecipeOptions,
    RunOptions,
)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def parsed(monkeypatch):
    """Give the options that a command line of ``train`` makes, without training."""

    def parse(*arguments):
        seen = {}

        def train(
            data: DataOptions = DataOptions(),
            network: NetworkOptions = NetworkOptions(),
            recipe: RecipeOptions = RecipeOptions(),
            run: RunOptions = RunOptions(),
        ) -> None:
            """Train."""
            seen["options"] = Options(data, network, recipe, run)

        monkeypatch.setitem(cli.COMMANDS, "train", train)
        assert run("train", *arguments) == 0
        return seen["options"]

    return parse


def test_help_lists_every_command(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: normdrop {command} [options]")


def test_help_of_train_names_every_flag_and_the_recipes(capsys):
    run("train", "--help")
    shown = capsys.readouterr().out
    for flag in (
        "--data", "--model", "--precision", "--epochs", "--max-time", "--seed", "--norm, --no-norm",
        "--keep-input", "--keep-hidden", "--devices", "--config", "--resume", "--name",
        "--runs-dir", "--skip-unreadable", "--batch-size", "--learning-rate", "--label-smoothing",
    ):  # fmt: skip
        assert f"  {flag}" in shown
    for name in ("digits", "fashion-mnist", "vgg", "mlp", "otherwise"):
        assert f"\n  {name} " in shown.partition("Defaults, chosen for")[2]


def test_help_shows_choices_and_one_name_for_a_list(capsys):
    run("describe", "--help")
    assert "--memory {normal,low}" in capsys.readouterr().out
    run("train", "--help")
    shown = capsys.readouterr().out
    assert "  --keep-hidden X  " in shown
    assert "+" not in shown


def test_help_imports_no_torch():
    code = (
        "import sys; from normdrop.cli import main; main(['--help']); main(['train', '--help']);"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=600)


def test_without_arguments_the_commands_are_shown(capsys):
    assert run() == 0
    assert "Start with: normdrop train" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("normdrop 0.")


def test_flags_reach_the_options(parsed):
    options = parsed(
        "--data", "fashion-mnist", "--model", "vgg11", "--no-norm", "--keep-input", "0.9",
        "--keep-hidden", "0.5", "--epochs", "3", "--precision", "bfloat16", "--max-time", "20m",
        "--seed", "7", "--devices", "2", "--name", "a run", "--skip-unreadable",
        "--label-smoothing", "0", "--no-channels-last",
    )  # fmt: skip
    assert options == Options(
        DataOptions(data="fashion-mnist", skip_unreadable=True),
        NetworkOptions(model="vgg11", norm=False, keep_input=0.9, keep_hidden=0.5),
        RecipeOptions(epochs=3, precision="bfloat16", label_smoothing=0.0, channels_last=False),
        RunOptions(name="a run", seed=7, max_time="20m", devices=2),
    )


def test_keep_hidden_takes_one_for_each_layer(parsed):
    assert parsed("--keep-hidden", "[0.8, 0.5]").network.keep_hidden == [0.8, 0.5]


@pytest.mark.parametrize("first", [True, False])
def test_a_flag_overrides_the_file_of_options(parsed, tmp_path, first):
    file = tmp_path / "options.yaml"
    file.write_text("data: fashion-mnist\nepochs: 3\nnorm: false\nkeep_hidden: null\n")
    flags = ["--epochs", "5"]
    config = ["--config", str(file)]
    options = parsed(*(flags + config if first else config + flags))
    assert options.data.data == "fashion-mnist"
    assert options.recipe.epochs == 5
    assert options.network.norm is False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "Unknown command 'trian'; did you mean train?"),
        (["train", "--epochs", "many"], "Expected --epochs to be a whole number, but got 'many'"),
        (["train", "--seed", "1.5"], "Expected --seed to be a whole number, but got '1.5'"),
        (["train", "--keep-input", "x"], "Expected --keep-input to be a number, but got 'x'"),
        (
            ["train", "--precision", "half"],
            "Expected --precision to be float32 or bfloat16 or float64, but got 'half'",
        ),
        (
            ["train", "--kepe-hidden", "1"],
            "Unknown option --kepe-hidden, did you mean --keep-hidden?",
        ),
        (["train", "digits"], "Expected options, but got 'digits' too"),
        (["train", "--config", "nowhere.yaml"], "There is no file 'nowhere.yaml' for --config"),
        (
            ["train", "--keep-output", "0.5"],
            "There is no option --keep-output, since the output layer is never dropped",
        ),
        (["train", "--keep-hidden", "1.5"], "Expected keep_hidden in (0, 1], the probability"),
        (["train", "--keep-input", "0"], "Expected keep_input in (0, 1], the probability"),
        (
            ["train", "--model", "mlp_32", "--keep-hidden", "[0.5, 0.5]"],
            "the output",
        ),
        (["train", "--epochs", "0"], "Expected epochs above 0, but got 0"),
        (["train", "--batch-size", "1"], "Expected batch_size of at least 2, but got 1"),
        (["train", "--learning-rate", "-1"], "Expected learning_rate above 0, but got -1"),
        (["train", "--label-smoothing", "1"], "Expected label_smoothing in [0, 1), but got 1"),
        (["train", "--validation", "0"], "Expected validation in (0, 1), but got 0"),
        (["train", "--test", "0.6", "--validation", "0.5"], "but they sum to 1.1"),
        (["train", "--seed", "-1"], "Expected seed in [0, 2⁶³), but got -1"),
        (["train", "--lr", "0.1"], "Unknown option --lr, did you mean --learning-rate?"),
        (["train", "--threads", "100000"], "Expected threads of at most "),
        (["train", "--max-time", "soon"], "Expected max_time such as 90s, 20m or 1h30m"),
        (["train", "--devices", "0"], "Expected devices above 0, but got 0"),
        (["train", "--devices", "99999"], "Expected devices of at most"),
        (["train", "--name", "."], "Expected name to be a folder's name, but got '.'"),
        (["train", "--data", ""], "Expected data to be digits, fashion-mnist, a folder or a"),
        (["train", "--name", "a/b"], "Expected name to be a folder's name, but got 'a/b'"),
        (["train", "--data", "nowhere"], "there is nothing at 'nowhere'"),
        (["train", "--data", "fashion_mnist"], "did you mean 'fashion-mnist'?"),
        (["train", "--model", "resnt20"], 'did you mean "resnet20"?'),
        (["train", "--model", "resnet21"], "expected `depth` to be"),
        (["train", "--model", "vgg11"], "vgg11"),
        (["train", "--target", "x"], "target is not an option of digits; leave it out"),
        (["train", "--resume", "nowhere"], "Expected a run folder, but nowhere is not there"),
        (["evaluate", "nowhere"], "Expected a run folder, but nowhere is not there"),
        (["predict", "nowhere", "a.png"], "Expected a run folder, but nowhere is not there"),
        (["predict", "nowhere"], "the following arguments are required: files"),
        (["describe", "--input", "3x"], "Expected input such as 224x224x3"),
        (["describe", "--model", "vgg12"], "vgg"),
        (["describe", "--classes", "0"], "Expected `classes` to be a whole number of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_gets_one_sentence_and_code_2(
    arguments, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.startswith("normdrop: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()


def test_no_traceback_from_the_real_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "normdrop", "train", "--data", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("normdrop: data must be")
    assert done.stderr.count("\n") == 1


def test_a_file_of_options_with_an_unknown_one(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("epoch: 3\n")
    assert run("train", "--config", file) == 2
    assert "Unknown option 'epoch' in the file of options, did you mean 'epochs'?" in (
        capsys.readouterr().err
    )


def test_ctrl_c_gives_130_and_the_way_on(monkeypatch, capsys):
    def train() -> None:
        """Train."""
        raise KeyboardInterrupt("Stopped; go on with: normdrop train --resume runs/x")

    monkeypatch.setitem(cli.COMMANDS, "train", train)
    assert run("train") == 130
    assert "normdrop train --resume runs/x" in capsys.readouterr().err


def test_a_warning_is_one_sentence(monkeypatch, capsys):
    import warnings

    def train() -> None:
        """Train."""
        warnings.simplefilter("always")
        warnings.warn("normdrop: slow", RuntimeWarning, stacklevel=2)

    monkeypatch.setitem(cli.COMMANDS, "train", train)
    assert run("train") == 0
    assert capsys.readouterr().err == "normdrop: warning: slow\n"


def test_commands_are_called_from_python_too(tmp_path, capsys):
    cli.describe(model="mlp_8", input="4", classes=3)
    assert "Batch normalization adds 8 nodes" in capsys.readouterr().out


def test_describe_says_which_path_each_layer_takes(capsys):
    assert run("describe", "--model", "mlp_8", "--input", "4", "--kernels") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].endswith("path")
    assert "Paths are those of training on this machine" in shown
    run("describe", "--model", "mlp_8", "--input", "4")
    assert "Paths are" not in capsys.readouterr().out


def test_describe_counts_what_the_memory_option_keeps(capsys):
    totals = {}
    for memory in ("normal", "low"):
        cli.describe(model="resnet8", input="32x32x3", batch_size=4, memory=memory)
        (total,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("total")]
        totals[memory] = float(total.split()[-2])
    assert totals["low"] < 0.7 * totals["normal"]


def test_options_file_is_plain():
    assert json.dumps(Options().flat())


def test_a_file_that_holds_no_options_is_named(tmp_path, capsys):
    empty, record = tmp_path / "empty.yaml", tmp_path / "run.json"
    empty.touch()
    record.write_text('{"network": {}}')
    assert run("train", "--config", str(empty)) == 2
    assert f"The file of options '{empty}' is empty" in capsys.readouterr().err
    assert run("train", "--config", str(record)) == 2
    assert f"give '{tmp_path / 'options.yaml'}'" in capsys.readouterr().err


def test_of_two_files_of_options_both_hold_and_the_later_first(tmp_path, monkeypatch):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("epochs: 3\nseed: 5\n")
    two.write_text("epochs: 4\n")
    given = parse(cli.train, ["--config", str(one), "--config", str(two)], prog="normdrop train")
    assert (given["recipe"].epochs, given["run"].seed) == (4, 5)
