import html.parser
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from normdrop.errors import UserError
from normdrop.report.report import write_report
from normdrop.report.wording import percent

FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
VOID = {"meta", "link", "img", "br", "wbr", "path", "use", "image", "rect", "line"}


class Page(html.parser.HTMLParser):
    """The tags of a page: their nesting, identifiers, addresses, headings and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.links: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.open and re.fullmatch(r"h[1-6]", self.open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def _note(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("href", "src", "xlink:href", "srcset", "data", "action", "poster"):
            if name in attributes:
                target = attributes[name]
                (self.links if target.startswith("#") else self.addresses).append(target)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def read(folder: Path) -> tuple[Page, str]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return check(text), text


def check(text: str) -> Page:
    """What must hold for every page: well-formed, complete in itself, in order, accessible."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))
    assert not any(tag in {"script", "iframe", "object", "embed"} for tag, _ in page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in {"row", "col"}
    return page


def has_section(page: Page, name: str) -> bool:
    return ("section", name) in [(tag, attributes.get("id")) for tag, attributes in page.tags]


@pytest.fixture(scope="module")
def finished(finished_run):
    """One finished run that several tests read: its folder, its page, the page's text."""
    return finished_run, *read(finished_run)


def test_report_shows_every_part_of_a_finished_run(finished):
    folder, page, text = finished
    for section in (
        "stands-out", "curves", "classes", "calibration", "mistakes", "batch-norm", "dropout",
        "data", "options", "again",
    ):  # fmt: skip
        assert has_section(page, section)
    for figure in (
        "loss", "accuracy", "learning_rate", "speed", "confusion", "classes", "reliability",
        "gamma", "alpha", "mean", "variance",
    ):  # fmt: skip
        assert f"figure-{figure}" in page.ids
    result = json.loads((folder / "result.json").read_text())
    low, high = result["accuracy_interval"]
    assert f"{100 * result['accuracy']:.2f} % test accuracy" in page.text
    assert f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in page.text
    for part in ("resnet20 on digits", "30 epochs", "36 s", "Some Processor 9000", "2 threads"):
        assert part in page.text
    assert "normdrop train --config run/options.yaml" in page.text
    for name, value in yaml.safe_load((folder / "options.yaml").read_text()).items():
        assert name in page.text
        assert (value if isinstance(value, str) else json.dumps(value)) in page.text
    assert len(text) < 2_000_000
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots == {
        "loss.png", "accuracy.png", "learning_rate.png", "speed.png", "confusion.png",
        "reliability.png", "mistakes.png", "gamma.png", "alpha.png", "mean.png", "variance.png",
    }  # fmt: skip
    assert all((folder / "plots" / n).read_bytes().startswith(b"\x89PNG") for n in plots)
    assert not list(folder.glob(".*.part"))


def test_report_of_a_run_that_training_wrote(real_run, tmp_path):
    page, _ = read(shutil.copytree(real_run, tmp_path / "run"))
    result = json.loads((real_run / "result.json").read_text())
    assert f"{100 * result['accuracy']:.2f} % test accuracy" in page.text
    assert result["command"] in page.text
    assert "Not in this run folder" not in page.text
    assert "1,797" not in page.text
    assert "809 training, 90 validation and 898 test samples of 10 classes" in page.text


def test_report_is_the_same_wherever_and_whenever_it_is_written(finished, tmp_path):
    folder, _, text = finished
    shutil.copytree(folder, tmp_path / "run")
    assert read(tmp_path / "run")[1] == text


def test_report_shows_the_weakest_class_first(finished):
    folder, _, text = finished
    rows = json.loads((folder / "result.json").read_text())["per_class"]
    table = text.split('<table class="classes">')[1].split("</table>")[0]
    shown = re.findall(r'<th scope="row">(.*?)</th>', table)
    f1 = {row["class"]: row["f1"] for row in rows}
    assert [f1[name] for name in shown] == sorted(f1.values())
    assert len(set(f1.values())) > 1


def test_report_shows_mistakes_as_shares_of_the_true_class(make_run):
    folder = make_run(classes=3, error=0.5, samples=90, epochs=1, layers=1)
    _, text = read(folder)
    counts = np.array(json.loads((folder / "result.json").read_text())["confusion"])
    table = text.split("<h4>Most frequent mistakes</h4>")[1].split("</table>")[0]
    shown = re.findall(r"<tr><td>(.)</td><td>(.)</td><td[^>]*>(\d+)</td><td[^>]*>(.*?)</td>", table)
    assert len(shown) == np.count_nonzero(counts - np.diag(np.diag(counts)))
    for truth, guess, count, share in shown:
        row = counts[int(truth)]
        assert int(count) == row[int(guess)]
        assert share == percent(int(count) / row.sum())
    assert (counts.sum(0) != counts.sum(1)).any()


def test_report_shows_the_worst_mistakes_in_order(finished):
    folder, page, _ = finished
    tensors = load_file(folder / "evaluation.safetensors")
    names = json.loads((folder / "evaluation.json").read_text())["mistake_names"]
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(tensors["mistakes"])
    for picture, index, name in zip(pictures, tensors["mistakes"], names, strict=True):
        row = tensors["probabilities"][index]
        assert picture["src"].startswith("data:image/png;base64,")
        assert picture["alt"] == (
            f"Picture {name}: truth {tensors['labels'][index]}, prediction {row.argmax()} "
            f"with probability {row.max():.3f}"
        )


def test_report_escapes_what_users_wrote(make_run):
    folder = make_run(
        classes=("<b>bold</b>", "$\\frac", "a & \"b\" 'c'", "猫", "<script>alert(1)</script>"),
        data="<img src=x onerror=alert(1)>.csv",
        samples=60,
        error=0.5,
        epochs=2,
        layers=1,
    )
    page, text = read(folder)
    assert "<b>bold" not in text
    assert "<script" not in text
    assert "<img src=x" not in text
    for name in ("<b>bold</b>", "$\\frac", "a & \"b\" 'c'", "猫", "<script>alert(1)</script>"):
        assert name in page.text
    assert "on <img src=x onerror=alert(1)>.csv" in page.headings[0][1]


def test_report_lists_images_that_were_left_out(make_run):
    skipped = tuple((f"/pets/cat/{n}<b>.png", f"truncated after {n} bytes") for n in range(11))
    page, text = read(make_run(epochs=2, layers=1, skipped=skipped))
    assert has_section(page, "data")
    assert "11 images were left out because they could not be read" in page.text
    assert "the first 8; 3 more stand in run.json" in page.text
    assert "#data" in page.links
    assert "<b>.png" not in text
    shown = "".join(page.text.split())
    for place, (name, reason) in enumerate(skipped):
        assert (name in shown) == (reason in page.text) == (place < 8)
    page, _ = read(make_run("all", epochs=2, layers=1, skipped=skipped[:8]))
    assert "more stand in run.json" not in page.text


def test_report_of_a_run_that_did_not_count_its_samples(make_run):
    folder = make_run(epochs=2, layers=1)
    record = json.loads((folder / "run.json").read_text())
    for name in ("samples", "skipped", "dropped"):
        del record[name]
    (folder / "run.json").write_text(json.dumps(record))
    page, _ = read(folder)
    assert not has_section(page, "data")
    assert "#data" not in page.links


@pytest.mark.parametrize(
    "damage", [{"samples": {"train": [1]}}, {"samples": [1]}, {"skipped": ["a.png"]}]
)
def test_report_refuses_a_damaged_count_of_the_samples(make_run, damage):
    folder = make_run(epochs=2, layers=1)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | damage))
    with pytest.raises(UserError, match=r"run\.json"):
        write_report(folder)


def test_report_of_an_unfinished_run_says_so(make_run):
    folder = make_run(finished=False, epochs=4)
    page, _ = read(folder)
    assert "This run is unfinished: 4 epochs are recorded" in page.text
    assert "result.json" in page.text
    assert "--resume" in page.text
    assert has_section(page, "curves")
    assert not has_section(page, "classes")
    assert "test accuracy" not in page.text


def test_report_before_the_first_epoch(make_run):
    folder = make_run(finished=False)
    (folder / "metrics.csv").unlink()
    page, _ = read(folder)
    assert "No epoch is recorded yet" in page.text
    assert "0 epochs are recorded" in page.text


def test_report_with_every_optional_file_missing(make_run):
    folder = make_run()
    for path in folder.iterdir():
        if path.name not in {"run.json", "result.json"}:
            path.unlink()
    page, _ = read(folder)
    assert "Not in this run folder: options.yaml" in page.text
    assert "evaluation of this run is missing" in page.text


def test_report_of_a_table_has_no_pictures_and_lists_its_dropout_layers(make_run):
    folder = make_run(
        network="mlp_32_16", kind="table", data="wine.csv", classes=3, layers=2, epochs=2,
        network_options={"keep_input": 0.8, "keep_hidden": 0.5},
    )  # fmt: skip
    page, _ = read(folder)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "row " in page.text
    assert "3 layers kept each value with probability 0.5 and 0.8" in page.text
    assert not (folder / "plots" / "mistakes.png").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 1, "layers": 1}, ("One epoch is too short",)),
        (
            {"norm": False, "epochs": 2, "network": "of_tomorrow9"},
            ("trained without batch norm layers", "keep_hidden = 0.8", "cannot build that network"),
        ),
        (
            {"classes": 2, "epochs": 2, "layers": 1, "picture": (97, 61, 3), "error": 0.2},
            ("2 epochs are too few", "Worst mistakes"),
        ),
        (
            {"classes": 100, "samples": 2000, "epochs": 3, "layers": 1},
            ("Most frequent mistakes", "of 2,000 test samples lie on the diagonal"),
        ),
        (
            {"error": 0.0, "samples": 50, "epochs": 3, "layers": 1, "channels": 1},
            ("classified right", "over 1 channel in 1 layer"),
        ),
    ],
    ids=["one-epoch", "no-norm", "two-classes", "hundred-classes", "no-mistake"],
)
def test_report_of_unusual_runs(make_run, options, said):
    page, text = read(make_run(**options))
    assert all(sentence in page.text for sentence in said)
    assert len(text) < 2_000_000


def test_report_with_values_that_are_not_finite(make_run):
    folder = make_run(epochs=4, layers=3)
    weights = load_file(folder / "weights.safetensors")
    weights["layer1.0.bn1.running_mean"][3] = np.nan
    weights["layer1.0.bn2.running_var"][:] = np.inf
    save_file(weights, folder / "weights.safetensors")
    rows = (folder / "metrics.csv").read_text().splitlines()
    rows[3] = "3,33,0.1,nan,0.1,inf,,1.2,"
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    page, _ = read(folder)
    assert "Channel 3 of layer1.0.bn1 is not finite" in page.text
    assert "Channel 0 of layer1.0.bn2 is not finite" in page.text
    assert "not finite in epoch 3" in page.text


def test_report_refuses_what_is_no_run(make_run, tmp_path):
    with pytest.raises(UserError, match="is not there; give the folder"):
        write_report(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        write_report(file)
    with pytest.raises(UserError, match=r"has no run\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["run.json", "result.json", "evaluation.json", "options.yaml", "metrics.csv",
     "weights.safetensors", "evaluation.safetensors"],
)  # fmt: skip
def test_report_names_a_damaged_file_and_keeps_the_page(make_run, name):
    folder = make_run(epochs=2, layers=1)
    (folder / "report.html").write_text("before")
    whole = (folder / name).read_bytes()
    damage = {"options.yaml": b"a: [", "metrics.csv": whole + b"3,x,,,,,,,\n"}
    (folder / name).write_bytes(damage.get(name, whole[: len(whole) // 2]))
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)
    assert (folder / "report.html").read_text() == "before"


@pytest.mark.parametrize(
    "text",
    ["", "junk\n", "epoch,step\n1,2\n", "{whole}3,4\n", "{whole}7,77,0,0,0,0,0,0,0\n"],
    ids=["empty", "junk", "other columns", "cut off", "epochs are missing"],
)
def test_report_refuses_metrics_that_no_run_wrote(make_run, text):
    folder = make_run(epochs=2, layers=1)
    whole = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text.replace("{whole}", whole))
    with pytest.raises(UserError, match=r"Cannot read .*metrics\.csv"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistakes", lambda values: values + 9999),
        ("mistakes", lambda values: values - 9999),
        ("labels", lambda values: values + 10),
        ("labels", lambda values: values - 10),
        ("probabilities", lambda values: values[:, :9].copy()),
        ("mistake_pictures", lambda values: values[1:].copy()),
    ],
)
def test_report_refuses_an_evaluation_that_does_not_fit_together(make_run, name, change):
    folder = make_run(epochs=1, layers=1)
    path = folder / "evaluation.safetensors"
    evaluation = load_file(path)
    save_file(evaluation | {name: change(evaluation[name])}, path)
    with pytest.raises(UserError, match="its tensors do not fit together"):
        write_report(folder)


@pytest.mark.parametrize("name", ["confusion", "per_class"])
def test_report_refuses_a_result_of_other_classes(make_run, name):
    folder = make_run(epochs=1, layers=1)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {name: result[name][:9]}))
    with pytest.raises(UserError, match="its tables are not those of the 10 classes"):
        write_report(folder)


def test_report_that_cannot_be_written_keeps_the_page(make_run, monkeypatch):
    folder = make_run(epochs=2, layers=1, finished=False)
    (folder / "report.html").write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normdrop.report.report.write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "before"
