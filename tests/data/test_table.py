from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from normdrop.data import load
from normdrop.data.table import Table
from normdrop.errors import UserError


def flowers(n=60, seed=0):
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "length": draw.normal(5, 2, n),
            "count": draw.integers(0, 9, n),
            "colour": draw.choice(["blue", "red", "white"], n),
            "wild": draw.random(n) < 0.5,
            "species": np.resize(["iris", "rose", "tulip"], n),
        }
    )


@pytest.fixture
def write(tmp_path):
    def write(frame, name="flowers.csv", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".parquet", ".pq"):
            frame.to_parquet(path, **options)
        else:
            options.setdefault("sep", "\t" if path.suffix == ".tsv" else ",")
            frame.to_csv(path, index=False, **options)
        return path

    return write


def inputs(data, split):
    loader = {"train": data.train_dataloader, "test": data.test_dataloader}[split]()
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs).numpy(), torch.cat(ys).numpy()


@pytest.mark.parametrize("name", ["flowers.csv", "flowers.tsv", "flowers.parquet", "flowers.pq"])
def test_table_of_numbers_and_categories(write, name):
    frame = flowers()
    data = load(write(frame, name), batch_size=7)
    data.setup()
    assert (data.name, data.kind) == ("flowers", "table")
    assert data.classes == ("iris", "rose", "tulip")
    assert data.input_shape == (6,)  # length, count, three colours, wild
    assert data.sizes == {"train": 43, "val": 5, "test": 12}
    assert data.augmentation == ()
    x, y = inputs(data, "test")
    rows = [int(name.removeprefix("row ")) - 1 for name in data.names("test", range(12))]
    part = frame.iloc[rows]
    assert [data.classes[c] for c in y] == part["species"].tolist()
    assert x[:, 2:5].argmax(1).tolist() == [
        ["blue", "red", "white"].index(colour) for colour in part["colour"]
    ]
    assert (x[:, 2:5].sum(1) == 1).all()
    assert data.pictures("test", [0]) == []


def test_table_is_standardised_by_the_training_rows_alone(write):
    frame = flowers()
    data = load(write(frame))
    data.setup()
    train, _ = inputs(data, "train")
    assert np.abs(train[:, [0, 1, 5]].mean(0)).max() < 1e-5
    assert np.abs(train[:, [0, 1, 5]].std(0) - 1).max() < 1e-5
    rows = [
        int(n.removeprefix("row ")) - 1 for n in data.names("train", range(data.sizes["train"]))
    ]
    seen = frame["length"].iloc[rows].to_numpy()
    test_rows = [int(n.removeprefix("row ")) - 1 for n in data.names("test", range(12))]
    expected = (frame["length"].iloc[test_rows].to_numpy() - seen.mean()) / seen.std()
    assert np.abs(inputs(data, "test")[0][:, 0] - expected).max() < 1e-5


def test_table_may_leave_standardising_to_the_network(write):
    frame = flowers()
    data = load(write(frame), standardize=False)
    x, _ = inputs(data, "test")
    rows = [int(name.removeprefix("row ")) - 1 for name in data.names("test", range(12))]
    assert np.abs(x[:, 0] - frame["length"].iloc[rows].to_numpy()).max() < 1e-5


def test_constant_column_becomes_zero(write):
    x, _ = inputs(load(write(flowers().assign(length=3.5))), "train")
    assert (x[:, 0] == 0).all()


def test_category_that_only_the_test_part_has_is_zeros(write):
    train, test = flowers(30), flowers(9, seed=1)
    test.loc[2, "colour"] = "green"
    path = write(train, "set/train.csv")
    write(test, "set/test.csv")
    data = load(path.parent)
    data.setup()
    x, _ = inputs(data, "test")
    assert (x[2, 2:5] == 0).all()
    assert data.name == "set"
    assert data.names("test", [2]) == ["test row 3"]
    assert data.sizes == {"train": 27, "val": 3, "test": 9}


def test_test_table_with_a_class_that_training_never_saw_is_an_error(write):
    path = write(flowers(30), "set/train.csv")
    write(flowers(3).assign(species="orchid"), "set/test.parquet")
    with pytest.raises(UserError, match=r"the test part of set has a class .*: 'orchid'"):
        load(path.parent).setup()


def test_train_and_test_tables_with_other_columns_are_an_error(write):
    path = write(flowers(30), "set/train.csv")
    write(flowers(3).drop(columns="count"), "set/test.csv")
    with pytest.raises(UserError, match="same columns, but train and test differ in count"):
        load(path.parent).setup()


@pytest.mark.parametrize("name", ["target", "Label", "CLASS"])
def test_default_target_is_the_one_named_so(write, name):
    frame = flowers().rename(columns={"colour": name})
    data = load(write(frame))
    data.setup()
    assert data.state()["target"] == name
    assert data.classes == ("blue", "red", "white")


def test_target_option_and_ignored_columns(write):
    for ignore in (["species", "wild"], "species, wild"):
        data = load(write(flowers()), target="colour", ignore=ignore)
        data.setup()
        assert data.classes == ("blue", "red", "white")
        assert data.input_shape == (2,)


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        ([0.5, 1.5, 2.5], ("0.5", "1.5", "2.5")),
        ([True, False, True], ("False", "True")),
        (["b", "a", "ü"], ("a", "b", "ü")),
    ],
)
def test_classes_of_every_type_are_sorted_and_readable(write, values, classes):
    frame = flowers().assign(species=np.resize(np.array(values), 60))
    data = load(write(frame))
    data.setup()
    assert data.classes == classes
    _, y = inputs(data, "test")
    rows = [int(name.removeprefix("row ")) - 1 for name in data.names("test", range(12))]
    found = [classes[c] for c in y]
    assert [float(v) if v[0].isdigit() else v for v in found] == [
        v if isinstance(v, str) else (str(v) if isinstance(v, (bool, np.bool_)) else float(v))
        for v in frame["species"].iloc[rows]
    ]


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_separator_and_byte_order_mark_are_found_out(write, separator):
    path = write(flowers(), sep=separator, encoding="utf-8-sig")
    data = load(path)
    data.setup()
    assert data.state()["columns"][0]["name"] == "length"


def with_holes():
    frame = flowers()
    frame.loc[[3, 4], "length"] = np.nan
    frame.loc[7, "colour"] = None
    frame.loc[9, "species"] = None
    frame["count"] = frame["count"].astype(float)
    frame.loc[11, "count"] = np.inf
    return frame


@pytest.mark.parametrize("name", ["flowers.csv", "flowers.parquet"])
def test_missing_values_are_an_error_that_counts_them(write, name):
    with pytest.raises(UserError) as caught:
        load(write(with_holes(), name)).setup()
    text = str(caught.value)
    assert "in length (2), count (1), colour (1), species (1); fill them in" in text
    assert "missing='drop' (--missing drop)" in text
    assert "\n" not in text


def test_missing_values_dropped_keep_the_other_rows_numbers(write):
    data = load(write(with_holes()), missing="drop")
    data.setup()
    assert sum(data.sizes.values()) == 55
    assert data.dropped == 5
    names = {n for split, count in data.sizes.items() for n in data.names(split, range(count))}
    assert names == {f"row {i + 1}" for i in range(60)} - {f"row {i}" for i in (4, 5, 8, 10, 12)}


def test_missing_values_everywhere_are_an_error_even_when_dropping(write):
    with pytest.raises(UserError, match="no row without missing values"):
        load(write(flowers().assign(length=np.nan)), missing="drop").setup()


def test_missing_option_is_checked():
    with pytest.raises(UserError, match="missing must be 'error' or 'drop', but got 'fill'"):
        Table("x.csv", missing="fill")


def test_missing_target_lists_the_columns_and_suggests_the_nearest(write):
    with pytest.raises(UserError) as caught:
        load(write(flowers()), target="specis").setup()
    text = str(caught.value)
    assert "it has length, count, colour, wild, species; did you mean 'species'?" in text


def test_ignored_target_and_nothing_left_are_errors(write):
    path = write(flowers())
    with pytest.raises(UserError, match="the target column 'species' cannot be in ignore"):
        load(path, ignore=["species"]).setup()
    with pytest.raises(UserError, match="must have a column beside the target"):
        load(path, ignore=["length", "count", "colour", "wild"]).setup()
    with pytest.raises(UserError, match=r"ignore 'color' is no column .*did you mean 'colour'"):
        load(path, ignore=["color"]).setup()


@pytest.mark.parametrize(
    "values",
    [np.random.default_rng(0).normal(size=300), np.arange(300), [f"id {i}" for i in range(300)]],
)
def test_target_with_too_many_values_is_no_classification(write, values):
    frame = flowers(300).assign(species=values)
    if isinstance(values, list):
        # Text that never repeats fails at the split: each class has one sample.
        with pytest.raises(UserError, match="class 'id 0' has only one sample"):
            load(write(frame)).setup()
    else:
        with pytest.raises(
            UserError, match=r"300 distinct values in 300 rows.*normdrop classifies"
        ):
            load(write(frame)).setup()


def test_text_column_that_never_repeats_is_an_error(write):
    frame = flowers(200).assign(colour=[f"name {i}" for i in range(200)])
    with pytest.raises(UserError, match=r"column 'colour' of .* distinct texts in .*ignore"):
        load(write(frame)).setup()


def test_columns_of_dates_or_lists_are_errors(write):
    dates = flowers().assign(length=pd.date_range("2020-01-01", periods=60))
    with pytest.raises(UserError, match=r"column 'length' of .* holds dates"):
        load(write(dates, "d.parquet")).setup()
    times = flowers().assign(length=pd.to_timedelta(np.arange(60), unit="s"))
    with pytest.raises(UserError, match=r"column 'length' of .* holds dates or durations"):
        load(write(times, "t.parquet")).setup()
    lists = flowers().assign(length=[[1, 2]] * 60)
    with pytest.raises(UserError, match=r"column 'length' of .* holds list|ndarray values"):
        load(write(lists, "l.parquet")).setup()


def test_table_with_one_class_or_a_lone_sample_is_an_error(write):
    with pytest.raises(UserError, match="at least 2 classes, but got only 'iris'"):
        load(write(flowers().assign(species="iris"))).setup()
    frame = flowers()
    frame.loc[5, "species"] = "orchid"
    with pytest.raises(UserError, match="class 'orchid' has only one sample left"):
        load(write(frame)).setup()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"x,target\n", "has no rows"),
        ("a.csv", b"a,b,a\n4,5,6\n", "has more than one column 'a'; give each its own name"),
        ("a.csv", b"1,2,3\n4,5,6\n", "must begin with a line of column names"),
        ("a.csv", b"0.94,1.5,x\n0.2,1.1,y\n", "must begin with a line of column names"),
        ("a.csv", b'a,target\n1,2\n"3,4\n', "row 2 of table .* has 1 value, but"),
        ("a.csv", b"a,target\n\xff\xfe,2\n", "is not text in UTF-8; save it as such"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        load(path).setup()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decimal_numbers_are_numbers(write):
    frame = flowers()
    frame["length"] = [Decimal(f"{v:.3f}") for v in frame["length"]]
    data = load(write(frame, "d.parquet"))
    data.setup()
    assert data.input_shape == (6,)


def test_numbers_beyond_float32_are_an_error(write):
    frame = flowers()
    frame.loc[0, "length"] = 1e200
    with pytest.raises(UserError, match=r"column 'length' of .* has numbers beyond 1e[+]30"):
        load(write(frame)).setup()


def test_augmentation_of_a_table_is_an_error(write):
    with pytest.raises(UserError, match="augment is for images, but flowers is a table"):
        load(write(flowers()), augment=True).setup()


def test_table_digest_notices_a_changed_value(write):
    def digest(frame):
        data = load(write(frame))
        data.setup()
        return data.digest

    first = digest(flowers())
    changed = flowers()
    changed.loc[0, "length"] += 1
    assert digest(changed) != first
    assert digest(flowers()) == first
