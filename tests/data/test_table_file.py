"""What the texts of a CSV are read as, against the values written out."""

import datetime
import json
import warnings

import numpy as np
import pandas as pd
import pytest

from normdrop.data import encoder, load
from normdrop.data.table_file import as_numbers, read_meaning, read_table
from normdrop.errors import UserError


@pytest.fixture
def table(tmp_path):
    """Write a CSV of two columns, v and the class, ten times over."""

    def table(values, *, repeat=10, separator=",", name="t.csv", target=("a", "b")):
        rows = [f"{v}{separator}{target[i % len(target)]}" for i, v in enumerate(values * repeat)]
        path = tmp_path / name
        path.write_text("\n".join([f"v{separator}target", *rows]) + "\n", encoding="utf-8")
        return path

    return table


def ready(path, **options):
    data = load(path, **options)
    data.setup()
    return data


def column(data):
    return data.state()["columns"][0]


def read_again(data, path):
    """The rows of a file as a finished run encodes them."""
    return np.stack([x for _, x in encoder(json.loads(json.dumps(data.state()))).read([path])])


def write_rows(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_rs_row_names_are_no_column(tmp_path):
    """As ``write.table(frame, sep = ",")`` writes: the header lacks the names' column."""
    lines = [f'"{i + 1}",{i / 10},{"ab"[i % 2]!r}'.replace("'", '"') for i in range(40)]
    path = write_rows(tmp_path, "\n".join(['"x","target"', *lines]) + "\n")
    with pytest.warns(UserWarning, match="begin with a name that the first line leaves out"):
        data = ready(path)
    assert data.classes == ("a", "b")
    assert [c["name"] for c in data.state()["columns"]] == ["x"]
    assert read_table_quietly(path)["x"].tolist() == [str(i / 10) for i in range(40)]


def test_rs_row_names_without_quotes_count_the_rows(tmp_path):
    path = write_rows(tmp_path, "x target\n1 0.5 a\n2 0.7 b\n".replace(" ", "\t"))
    assert read_table_quietly(path)["target"].tolist() == ["a", "b"]


def read_table_quietly(path):
    with warnings.catch_warnings(action="ignore"):
        return read_table(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,target\nSmith, John,1\nMiller, Ann,2\n", r"row 1 .* has 3 values, .* 2 columns"),
        ("x,y,target\n1,2,a\n1,2\n1,2,b\n", r"row 2 .* has 2 values, .* 3 columns"),
        ("x,y,target\n1,2,a\n\n1,2,3,b\n", r"row 2 .* has 4 values, .* 3 columns"),
        ("x;target\n1;a\n1;2;b\n", "holds a semicolon"),
        ('"x","target"\n1,2,a\n5,2,b\n', "row 1"),
    ],
    ids=["comma in every row", "short", "long", "semicolon", "names are not quoted"],
)
def test_ragged_rows_are_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_table(write_rows(tmp_path, text))


def test_separators_at_the_end_of_every_line_hold_no_value(tmp_path):
    frame = read_table(write_rows(tmp_path, "x,target\n1,a,\n2,b,\n"))
    assert frame["target"].tolist() == ["a", "b"]
    frame = read_table(write_rows(tmp_path, "x,target,\n1,a,\n2,b,\n"))
    assert list(frame.columns) == ["x", "target"]


def test_words_for_nothing_are_words_in_a_column_of_words(table):
    data = ready(table(["None", "NA", "null", "NaN", "red"]))
    assert column(data)["values"] == ["NA", "NaN", "None", "null", "red"]
    data = ready(table([1, 2], target=("None", "some")))
    assert data.classes == ("None", "some")


def test_an_empty_text_is_missing(table):
    with pytest.raises(UserError, match=r"missing or infinite values in v \(10\)"):
        ready(table(["", "red", "blue"]))


@pytest.mark.parametrize("mark", ["?", "NA", "nan", "-", "#N/A", "null"])
def test_a_mark_among_numbers_is_missing_and_said(table, mark):
    path = table([1.5, 2.5, mark, 4])
    with pytest.raises(UserError, match=rf"in v \(10, as '{'[?]' if mark == '?' else mark}' in ro"):
        ready(path)
    data = ready(path, missing="drop")
    assert data.dropped == 10
    assert column(data)["kind"] == "number"


def test_dropping_never_removes_a_class(table):
    path = table(["", 3], target=("a", "b"))
    path.write_text(path.read_text() + "4,c\n" * 5)
    with pytest.raises(UserError, match=r"every row of class 'a' .* ignore 'v'"):
        ready(path, missing="drop")


def test_zeros_in_front_make_another_class(table):
    data = ready(table([1, 2, 3], target=("007", "7")))
    assert data.classes == ("007", "7")
    assert column(ready(table(["01067", "1067", "99"])))["values"] == ["01067", "1067", "99"]
    assert column(ready(table(["0", "0.5", "-0.25"])))["kind"] == "number"


@pytest.mark.parametrize("spelled", [("true", "false"), ("TRUE", "FALSE"), ("True", "False")])
def test_true_and_false_with_gaps_are_read_alike_in_every_spelling(table, tmp_path, spelled):
    data = ready(table([*spelled, "", *spelled]), missing="drop", standardize=False)
    assert column(data)["kind"] == "number"
    for words in (spelled, ("true", "False"), (1, 0)):
        path = write_rows(tmp_path, f"v\n{words[0]}\n{words[1]}\n")
        assert read_again(data, path).tolist() == [[1.0], [0.0]]


def test_true_and_false_as_classes_keep_their_spelling(table):
    assert ready(table([1, 2], target=("yes", "no"))).classes == ("no", "yes")
    assert ready(table([1, 2], target=("true", "false"))).classes == ("false", "true")


def test_train_and_test_tables_get_their_types_together(table, tmp_path):
    (tmp_path / "set").mkdir()
    table(["1", "2", "3"], name="set/train.csv", target=("1", "2"))
    table(["4.5", "A"], name="set/test.csv", target=("1.0", "2.0"))
    data = ready(tmp_path / "set")
    assert data.classes == ("1", "2")
    assert column(data) == {"name": "v", "kind": "category", "values": ["1", "2", "3"]}
    frame = read_table(tmp_path / "set" / "test.csv")
    frame.to_parquet(tmp_path / "set" / "test.parquet")
    (tmp_path / "set" / "test.csv").unlink()
    assert ready(tmp_path / "set").digest == data.digest


@pytest.mark.parametrize(
    ("texts", "separator", "form", "values"),
    [
        (["1,5", "2", "-3,25"], ";", "decimal comma", [1.5, 2, -3.25]),
        (["1,5", "2", "-3,25"], ",", "decimal comma", [1.5, 2, -3.25]),
        (["1.234,5", "17"], ";", "decimal comma", [1234.5, 17]),
        (["1,000", "2,500"], ",", "commas between thousands", [1000, 2500]),
        (["1,000", "2,500"], ";", "decimal comma", [1, 2.5]),
        (["1,000,000.5", "7"], ";", "commas between thousands", [1000000.5, 7]),
        (["50%", "7.5 %"], ",", "percent signs", [0.5, 0.075]),
    ],
)
def test_other_ways_to_write_numbers_are_read_and_said(texts, separator, form, values, tmp_path):
    with pytest.warns(UserWarning, match=f"is read as numbers with {form}: "):
        meaning = read_meaning(pd.Series(texts), "v", tmp_path, separator=separator)
    assert meaning.form == form
    assert meaning.values.tolist() == values
    assert as_numbers(pd.Series(texts), form).tolist() == values


@pytest.mark.parametrize("texts", [["1", "-2.5", "3e2"], [" 1 ", "2"], ["inf", "1"], ["+1", ".5"]])
def test_plain_numbers_are_read_without_a_word(texts, tmp_path):
    meaning = read_meaning(pd.Series(texts), "v", tmp_path)
    assert meaning.form == "plain"
    assert meaning.values.tolist() == [float(text) for text in texts]


def test_new_rows_are_read_as_the_training_rows_were(table, tmp_path):
    with pytest.warns(UserWarning, match="decimal comma: 1,5 is 1.5"):
        data = ready(table(["1,5", "2,5", "3"], separator=";"), standardize=False)
    assert column(data)["form"] == "decimal comma"
    # A single row would say nothing of its comma.
    path = write_rows(tmp_path, "v;w\n1,000;x\n")
    assert read_again(data, path).tolist() == [[1.0]]
    with pytest.raises(UserError, match=r"no numbers where training had numbers, in v \(1\)"):
        read_again(data, write_rows(tmp_path, "v;w\n1.5;x\n"))


def test_one_word_among_numbers_is_said_with_its_row(table):
    values = [str(n) for n in range(100)]
    values[41] = "unknown"
    with pytest.raises(UserError, match=r"'v' of .* holds numbers, but 'unknown' in row 42; mend"):
        ready(table(values, repeat=1))
    grades = [str(n) for n in range(10)] * 5
    grades[7] = "K"
    with pytest.warns(UserWarning, match=r"'K' in row 8; its values are taken as categories"):
        data = ready(table(grades, repeat=1))
    assert column(data)["kind"] == "category"


def test_too_many_texts_are_counted_in_the_whole_table(table):
    with pytest.raises(UserError, match="holds 120 distinct texts in 120 rows"):
        ready(table([f"name {n}" for n in range(120)], repeat=1))


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_a_column_that_counts_the_rows_is_left_out(tmp_path, name):
    lines = [f"{i},{i / 10},{'ab'[i % 2]}" for i in range(40)]
    path = write_rows(tmp_path, "\n".join([f"{name},x,target", *lines]) + "\n")
    with pytest.warns(UserWarning, match="the first column of .* has no name"):
        data = ready(path)
    assert [c["name"] for c in data.state()["columns"]] == ["x"]


def test_another_column_without_a_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"column 2 of table .* has no name; give it one"):
        read_table(write_rows(tmp_path, "x,,target\n1,2,a\n3,4,b\n"))


def test_excels_line_of_the_separator_is_taken(tmp_path):
    frame = read_table(write_rows(tmp_path, "sep=;\nx;y,z;target\n1;2;a\n3;4;b\n"))
    assert list(frame.columns) == ["x", "y,z", "target"]
    assert frame["target"].tolist() == ["a", "b"]


def test_a_first_line_of_values_is_refused(tmp_path):
    for line in ("0.0,0,a", "1e3,x,y", "1,2,3"):
        with pytest.raises(UserError, match="must begin with a line of column names"):
            read_table(write_rows(tmp_path, f"{line}\n1.5,1,b\n"))
    assert list(read_table(write_rows(tmp_path, "0,1,label\n5,6,a\n")).columns) == [
        "0",
        "1",
        "label",
    ]


def test_parquet_columns_may_be_named_by_numbers(tmp_path):
    frame = pd.DataFrame({0: np.arange(40.0), 1: np.resize(["a", "b"], 40)})
    frame.to_parquet(tmp_path / "t.parquet")
    data = ready(tmp_path / "t.parquet")
    assert data.state()["target"] == "1"
    assert data.classes == ("a", "b")


def test_dates_of_parquet_are_dates(tmp_path):
    frame = pd.DataFrame({"d": [datetime.date(9999, 12, 31)] * 40, "c": np.resize([0, 1], 40)})
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column 'd' of .* holds dates or durations"):
        ready(tmp_path / "t.parquet")


def test_true_and_false_of_parquet_may_have_gaps(tmp_path):
    flags = np.resize(np.array([True, False, None], dtype=object), 60)
    pd.DataFrame({"v": flags, "c": np.resize(["a", "b"], 60)}).to_parquet(tmp_path / "t.parquet")
    data = ready(tmp_path / "t.parquet", missing="drop")
    assert column(data)["kind"] == "number"
    assert data.dropped == 20
