"""A finished run, tested again and used for predictions."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_iris

from normdrop import cli, data
from normdrop.errors import UserError
from normdrop.runs.folder import COLUMNS
from normdrop.runs.options import Options
from normdrop.runs.weights import load_network
from normdrop.training import measure
from normdrop.training.evaluate import evaluate
from normdrop.training.fit import train
from normdrop.training.predict import predictions


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_a_finished_run_holds_everything(finished_run):
    for name in (
        "options.yaml", "run.json", "metrics.csv", "result.json", "weights.safetensors",
        "evaluation.safetensors", "evaluation.json", "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    ):  # fmt: skip
        assert (finished_run / name).is_file(), name
    assert list((finished_run / "tensorboard").glob("events.*"))
    assert not list(finished_run.rglob("*.part"))
    with (finished_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert tuple(rows[0]) == COLUMNS
    result = result_of(finished_run)
    assert set(result) == {
        "split", "flip_test", "count", "accuracy", "accuracy_interval", "loss", "calibration_error",
        "per_class", "confusion", "reliability", "epochs", "best_epoch", "diverged",
        "train_seconds", "parameters", "machine", "command",
    }  # fmt: skip
    assert result["command"] == f"normdrop train --config {finished_run / 'options.yaml'}"
    record = json.loads((finished_run / "run.json").read_text())
    assert record["network"]["name"] == "resnet8"
    assert record["norm_layers"][0] == {"name": "input_norm", "features": 1}
    counts = {split: sum(classes) for split, classes in record["samples"].items()}
    assert set(counts) == {"train", "val", "test"}
    assert counts["test"] == result["count"]
    assert record["samples"]["test"] == [row["support"] for row in result["per_class"]]
    assert record["skipped"] == []
    assert record["dropped"] == 0


def test_the_best_epoch_has_the_highest_validation_accuracy(finished_run):
    with (finished_run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert result_of(finished_run)["best_epoch"] == int(best["epoch"])


def test_the_report_can_show_the_worst_mistakes(finished_run):
    tensors = safetensors.torch.load_file(finished_run / "evaluation.safetensors")
    count = result_of(finished_run)["count"]
    assert tensors["probabilities"].shape == (count, 10)
    mistakes, labels = tensors["mistakes"], tensors["labels"]
    given = tensors["probabilities"][mistakes]
    assert (given.argmax(1) != labels[mistakes]).all()
    confidence = given.max(1).values
    assert torch.equal(confidence, confidence.sort(descending=True).values)
    assert tensors["mistake_pictures"].shape == (len(mistakes), 8, 8, 1)
    names = json.loads((finished_run / "evaluation.json").read_text())["mistake_names"]
    assert len(names) == len(mistakes)


def test_evaluating_again_gives_the_same_figures(finished_run):
    again, result = evaluate(finished_run), result_of(finished_run)
    for key in ("count", "accuracy", "confusion"):
        assert again[key] == result[key]
    # Right after training the weights lie channels_last, loaded again they do not.
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_is_tested_in_order_and_unchanged(small, monkeypatch, split):
    run = train(small(epochs=1, augment="shift,erase"))
    seen = []

    def predict_batches(network, batches, *, flip):
        seen.extend(batches)
        return measure.predict_batches(network, seen, flip=flip)

    monkeypatch.setattr("normdrop.training.evaluate.predict_batches", predict_batches)
    evaluate(run, split=split)
    x = torch.cat([x for x, _ in seen])
    own = data.load("digits", seed=0, test=0.5, validation=0.2)
    pictures = np.stack(own.pictures(split, range(len(x))))
    assert len(x) == own.sizes[split]
    assert torch.equal(x, torch.from_numpy(pictures).movedim(3, 1) / 255)
    counts = torch.cat([y for _, y in seen]).bincount(minlength=10)
    assert counts.tolist() == own.class_counts()[split]


def test_evaluate_prints_tables_or_json(finished_run, capsys):
    assert cli.main(["evaluate", str(finished_run)]) == 0
    shown = capsys.readouterr().out
    assert f"accuracy {result_of(finished_run)['accuracy']:.2%}" in shown
    assert "truth \\ answer" in shown
    assert "precision" in shown
    assert cli.main(["evaluate", str(finished_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == result_of(finished_run)["count"]


def test_mirror_images_are_averaged_where_the_run_or_the_flag_says_so(
    finished_run, digit_folder, tmp_path
):
    network, record = load_network(finished_run)
    plain = evaluate(finished_run)
    flipped = evaluate(finished_run, flip=True)
    assert (plain["flip_test"], flipped["flip_test"]) == (False, True)
    assert plain["loss"] != flipped["loss"]
    # The run's own option holds for the test and for predictions.
    run = shutil.copytree(finished_run, tmp_path / "run")
    options = (run / "options.yaml").read_text()
    (run / "options.yaml").write_text(options.replace("flip_test: false", "flip_test: true"))
    assert evaluate(run)["loss"] == flipped["loss"]
    assert evaluate(run, flip=False)["loss"] == plain["loss"]
    file = digit_folder / "0" / "0.png"
    (_, x), = data.encoder(record["data"]).read([file])  # fmt: skip
    with torch.no_grad():
        expected = (network(x[None]).softmax(1) + network(x[None].flip(3)).softmax(1)) / 2
    shown = list(predictions(run, [file])[0]["probabilities"].values())
    torch.testing.assert_close(torch.tensor(shown), expected[0])


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_splits_can_be_evaluated(finished_run, split):
    assert evaluate(finished_run, split=split)["count"] == {"train": 719, "val": 180}[split]


@pytest.fixture
def digit_folder(tmp_path):
    """The first forty digits as pictures, in a folder for each class."""
    digits = load_digits()
    for place in range(40):
        folder = tmp_path / "digits" / str(digits.target[place])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(digits.images[place] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return tmp_path / "digits"


def test_other_data_are_read_as_the_runs_own(finished_run, digit_folder):
    result = evaluate(finished_run, source=str(digit_folder))
    assert result["count"] == 40
    # The pixels are the same, so the answers are.
    rows = predictions(finished_run, [digit_folder])
    right = sum(row["file"].split("/")[-2] == row["class"] for row in rows)
    assert result["accuracy"] == right / 40


def test_a_label_that_training_never_saw_is_named(finished_run, digit_folder):
    shutil.move(digit_folder / "3", digit_folder / "three")
    with pytest.raises(UserError, match="has the label 'three', which training never saw"):
        evaluate(finished_run, source=str(digit_folder))


def test_data_of_other_classes_are_refused(finished_run, tmp_path):
    frame = pd.DataFrame({"x": [1.0, 2.0], "y": [0, 1]})
    frame.to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(UserError, match="Expected a folder of images by class"):
        evaluate(finished_run, source=str(tmp_path / "table.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="to hold a folder for each class"):
        evaluate(finished_run, source=str(tmp_path / "empty"))


def test_predictions_in_every_form(finished_run, digit_folder, capsys, tmp_path):
    files = sorted(str(path) for path in digit_folder.rglob("*.png"))[:5]
    forms = {}
    for form in ("table", "csv", "json"):
        assert cli.main(["predict", str(finished_run), *files, "--format", form]) == 0
        forms[form] = capsys.readouterr().out
    rows = json.loads(forms["json"])
    assert [row["file"] for row in rows] == files
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
        assert row["file"] in forms["table"]
    table = list(csv.DictReader(io.StringIO(forms["csv"])))
    assert [row["class"] for row in table] == [row["class"] for row in rows]
    assert float(table[0]["p(3)"]) == pytest.approx(rows[0]["probabilities"]["3"], rel=1e-4)
    target = tmp_path / "out.csv"
    arguments = ["predict", str(finished_run), *files, "--format", "csv", "--output", str(target)]
    assert cli.main(arguments) == 0
    assert target.read_text() == forms["csv"]


@pytest.mark.parametrize("way", ["itself", "another way", "a link to it", "in its folder"])
def test_the_output_never_replaces_what_is_read(finished_run, tmp_path, capsys, way):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = folder / "a.png"
    Image.new("L", (8, 8)).save(picture)
    before = picture.read_bytes()
    (tmp_path / "link.csv").symlink_to(picture)
    given, output = {
        "itself": (picture, picture),
        "another way": (picture, tmp_path / "in" / ".." / "in" / "a.png"),
        "a link to it": (picture, tmp_path / "link.csv"),
        "in its folder": (folder, picture),
    }[way]
    assert cli.main(["predict", str(finished_run), str(given), "--output", str(output)]) == 2
    assert "since it is one of the files to predict; choose another" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize("name", ["weights.safetensors", "options.yaml", "checkpoints/last.ckpt"])
def test_the_output_never_replaces_a_file_of_the_run(finished_run, digit_folder, capsys, name):
    picture = str(digit_folder / "0" / "0.png")
    before = (finished_run / name).read_bytes()
    arguments = ["predict", str(finished_run), picture, "--output", str(finished_run / name)]
    assert cli.main(arguments) == 2
    assert "since it is a file of the run; choose another" in capsys.readouterr().err
    assert (finished_run / name).read_bytes() == before


def test_the_name_of_the_output_says_its_form(finished_run, digit_folder, tmp_path):
    picture = str(digit_folder / "0" / "0.png")

    def written(name, *more):
        arguments = ["predict", str(finished_run), picture, "--output", str(tmp_path / name)]
        assert cli.main([*arguments, *more]) == 0
        return (tmp_path / name).read_text()

    assert written("a.csv").startswith("file,class,probability,p(0)")
    assert json.loads(written("a.json"))[0]["file"] == picture
    assert json.loads(written("b.csv", "--format", "json"))[0]["file"] == picture
    assert written("a.txt").split()[:3] == ["file", "class", "probability"]


def test_what_was_predicted_before_an_error_is_kept(finished_run, digit_folder, tmp_path, capsys):
    pictures = [digit_folder / "0" / "0.png", tmp_path / "bad.png", digit_folder / "1" / "1.png"]
    pictures[1].write_bytes(b"no picture")
    output = tmp_path / "out.csv"
    arguments = ["predict", str(finished_run), *map(str, pictures), "--output", str(output)]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "bad.png' cannot be read" in shown.err
    assert f"by --skip-unreadable; what was predicted before it is in {output}" in shown.err
    assert [row["file"] for row in csv.DictReader(io.StringIO(output.read_text()))] == [
        str(pictures[0])
    ]


@pytest.mark.filterwarnings("always:.* left out")
def test_images_that_cannot_be_read_are_skipped_and_listed(
    finished_run, digit_folder, tmp_path, capsys
):
    pictures = [digit_folder / "0" / "0.png", tmp_path / "bad.png", digit_folder / "1" / "1.png"]
    pictures[1].write_bytes(b"no picture")
    arguments = ["predict", str(finished_run), *map(str, pictures), "--format", "json"]
    assert cli.main([*arguments, "--skip-unreadable"]) == 0
    shown = capsys.readouterr()
    assert [row["file"] for row in json.loads(shown.out)] == [str(pictures[0]), str(pictures[2])]
    assert f"warning: 1 image is left out: {pictures[1]} (it is no image" in shown.err
    whole = predictions(finished_run, [pictures[0], pictures[2]])
    assert predictions(finished_run, pictures, skip_unreadable=True) == whole


def test_the_table_names_the_class_that_comes_next(finished_run, digit_folder, capsys):
    picture = digit_folder / "0" / "0.png"
    (row,) = predictions(finished_run, [picture])
    (first, _), (second, share) = sorted(row["probabilities"].items(), key=lambda p: -p[1])[:2]
    assert cli.main(["predict", str(finished_run), str(picture)]) == 0
    shown = capsys.readouterr().out.splitlines()[-1].split()
    assert shown[1:] == [first, f"{row['probability']:.1%}", second, f"{share:.1%}"]


def test_a_file_that_cannot_be_read_is_named(finished_run, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    assert cli.main(["predict", str(finished_run), str(bad)]) == 2
    assert "bad.png" in capsys.readouterr().err
    assert cli.main(["predict", str(finished_run), str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err


@pytest.fixture(scope="module")
def iris_run(tmp_path_factory):
    """A run on a table with three classes."""
    folder = tmp_path_factory.mktemp("iris")
    iris = load_iris(as_frame=True)
    frame = iris.frame.assign(target=iris.target.map(dict(enumerate(iris.target_names))))
    frame.to_csv(folder / "iris.csv", index=False)
    options = Options.from_flat(
        {"data": str(folder / "iris.csv"), "model": "mlp_16", "epochs": 20, "batch_size": 16,
         "runs_dir": str(folder / "runs"), "threads": 1}
    )  # fmt: skip
    return train(options), folder / "iris.csv"


def test_a_table_from_training_to_prediction(iris_run):
    run, table = iris_run
    assert run.name == "iris-mlp_16-1"
    assert result_of(run)["accuracy"] > 0.8
    assert evaluate(run, source=str(table))["count"] == 150
    rows = predictions(run, [table])
    assert rows[0]["file"] == f"{table}:1"
    with pytest.raises(UserError, match="flip_test is for images, but the data is a table"):
        evaluate(run, source=str(table), flip=True)
    truth = pd.read_csv(table)["target"]
    right = sum(row["class"] == name for row, name in zip(rows, truth, strict=True))
    assert evaluate(run, source=str(table))["accuracy"] == right / 150
    assert "mistake_pictures" not in safetensors.torch.load_file(run / "evaluation.safetensors")


def test_a_table_without_the_target_is_named(iris_run, tmp_path):
    run, table = iris_run
    pd.read_csv(table).drop(columns="target").to_csv(tmp_path / "rows.csv", index=False)
    assert len(predictions(run, [tmp_path / "rows.csv"])) == 150
    with pytest.raises(UserError, match="to have the target column 'target'"):
        evaluate(run, source=str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.99])
def test_weights_that_were_cut_off_are_named(finished_run, tmp_path, keep):
    run = shutil.copytree(finished_run, tmp_path / "run")
    weights = run / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(UserError, match=r"Cannot read .*weights.safetensors .*cut off"):
        load_network(run)


def test_weights_of_another_network_are_named(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    weights = safetensors.torch.load_file(run / "weights.safetensors")
    weights["fc.weights"] = weights.pop("fc.weight")
    weights["fc.bias"] = torch.zeros(11)
    safetensors.torch.save_file(weights, run / "weights.safetensors")
    with pytest.raises(
        UserError,
        match=r"another network: fc.weight is missing; fc.weights is unknown; "
        r"fc.bias should have shape \(10,\), not \(11,\)",
    ):
        load_network(run)


def test_a_run_without_weights_says_how_to_finish_it(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "weights.safetensors").unlink()
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="has no weights yet; finish it with: normdrop train"):
        load_network(run)


def test_weights_that_were_lost_are_written_again(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    whole = (run / "weights.safetensors").read_bytes()
    (run / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"has lost its weights; write them again .* --resume"):
        evaluate(run)
    assert train(resume=run) == run
    assert (run / "weights.safetensors").read_bytes() == whole
    (run / "weights.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="lost its weights and its checkpoints; train again with"):
        evaluate(run)
    with pytest.raises(UserError, match="is finished; train again with"):
        train(resume=run)


def test_what_uses_a_run_starts_without_what_trains_one(finished_run, digit_folder, tmp_path):
    """Lightning takes as long to import as all else together."""
    code = """
import sys
from normdrop import cli
run, picture = sys.argv[1:]
for command in (["describe", run], ["predict", run, picture], ["evaluate", run], ["report", run]):
    assert cli.main(command) == 0
    assert "pytorch_lightning" not in sys.modules, command
    assert command[0] in ("evaluate", "report") or "sklearn" not in sys.modules, command
"""
    run = shutil.copytree(finished_run, tmp_path / "run")
    arguments = [str(run), str(digit_folder / "0" / "0.png")]
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=600
    )


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"Expected a run folder, but .*table\.csv is a file"):
        evaluate(tmp_path / "table.csv")


@pytest.mark.parametrize("name", ["run.json", "options.yaml"])
def test_a_damaged_run_folder_is_named(finished_run, tmp_path, name):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / name).write_text('{"network": [')
    with pytest.raises(UserError, match=f"Cannot read .*{name}"):
        evaluate(run)
