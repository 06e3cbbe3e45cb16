import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from normdrop.data import encoder, load
from normdrop.errors import UserError


def round_trip(data):
    return encoder(json.loads(json.dumps(data.state())))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_encoded_images_equal_the_batches(image_folder, mode):
    data = load(image_folder({"a": 6, "b": 6}, mode=mode, size=(12, 20)))
    data.setup()
    x, _ = next(iter(data.test_dataloader()))
    paths = data.names("test", range(len(x)))
    for place, (name, tensor) in enumerate(round_trip(data).read(paths)):
        assert name == paths[place]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, x[place])


def test_encoder_takes_any_mode_and_size(tmp_path):
    Image.new("RGBA", (31, 17), (9, 9, 9, 255)).save(tmp_path / "a.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "b.jpg")
    (tmp_path / "notes.txt").write_text("left alone in a folder")
    data = load("digits")
    found = dict(round_trip(data).read([tmp_path]))
    assert list(found) == [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    assert all(tensor.shape == (1, 8, 8) for tensor in found.values())
    assert found[str(tmp_path / "a.png")].max() == pytest.approx(9 / 255)


def test_encoder_names_what_it_cannot_read(tmp_path):
    images = encoder({"kind": "image", "channels": 3, "size": [8, 8]})
    with pytest.raises(UserError, match=r"there is no file '.*gone\.png'"):
        list(images.read([tmp_path / "gone.png"]))
    with pytest.raises(UserError, match="has no images"):
        list(images.read([tmp_path]))
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"image '.*a\.png' cannot be read"):
        list(images.read([tmp_path / "a.png"]))


@pytest.fixture
def trained(tmp_path):
    """A table's module, its frame and a function that writes another table beside it."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "size": draw.normal(3, 1, 50),
            "code": draw.choice(["007", "A1", "12"], 50),
            "kind": np.resize(["x", "y"], 50),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)

    def write(frame, name="new.csv"):
        path = tmp_path / name
        frame.to_parquet(path) if name.endswith("parquet") else frame.to_csv(path, index=False)
        return path

    data = load(tmp_path / "t.csv")
    data.setup()
    return data, frame, write


def test_encoded_rows_equal_the_batches(trained):
    data, frame, write = trained
    x, _ = next(iter(data.test_dataloader()))
    rows = [int(name.removeprefix("row ")) - 1 for name in data.names("test", range(len(x)))]
    for path in (write(frame.iloc[rows]), write(frame.iloc[rows], "new.parquet")):
        names, tensors = zip(*round_trip(data).read([path]), strict=True)
        assert names[0] == f"{path}:1"
        assert torch.equal(torch.stack(tensors), x)


def test_rows_need_no_target_and_may_have_more_columns_in_any_order(trained):
    data, frame, write = trained
    some = frame.assign(extra=1)[["extra", "code", "size"]].head(3)
    expected = [x for _, x in round_trip(data).read([write(frame.head(3))])]
    found = [x for _, x in round_trip(data).read([write(some)])]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_text_that_looks_like_a_number_stays_text(trained):
    data, frame, write = trained
    only = frame[frame["code"] == "007"].head(2)
    (_, x), *_ = round_trip(data).read([write(only)])
    assert x[1:].tolist() == [1.0, 0.0, 0.0]


def test_unseen_category_is_zeros_and_is_counted(trained):
    data, frame, write = trained
    new = frame.head(4).copy()
    new.loc[[1, 2], "code"] = "never"
    with pytest.warns(UserWarning, match="2 of 4 rows of .* have a value of 'code' that training"):
        found = [x for _, x in round_trip(data).read([write(new)])]
    assert found[1][1:].tolist() == [0.0, 0.0, 0.0]
    assert found[0][1:].sum() == 1


def test_missing_column_is_an_error_that_suggests_the_nearest(trained):
    data, frame, write = trained
    with pytest.raises(UserError, match="but lacks size; is it 'sizes' there"):
        list(round_trip(data).read([write(frame.rename(columns={"size": "sizes"}))]))


@pytest.mark.parametrize("value", [None, "large", np.inf])
def test_missing_value_or_text_for_a_number_is_an_error(trained, value):
    data, frame, write = trained
    new = frame.astype({"size": object})
    new.loc[3, "size"] = value
    with pytest.raises(UserError, match=r"missing, or no numbers where .* in size \(1\)"):
        list(round_trip(data).read([write(new)]))


@pytest.mark.parametrize("state", [{}, {"kind": "image", "channels": 1}, {"kind": "table"}])
def test_state_that_is_none_is_an_error(state):
    with pytest.raises(UserError, match="the run's description of its data"):
        encoder(state)
