import pytest

from normdrop.data import load
from normdrop.errors import UserError


def test_wrong_path_is_an_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="data must be 'digits', 'fashion-mnist', a folder of"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("digit", "digits"), ("Fashion_MNIST", "fashion-mnist"), ("fashionmnist", "fashion-mnist")],
)
def test_misspelt_source_suggests_the_nearest(given, meant):
    with pytest.raises(UserError, match=f"nothing at '{given}'; did you mean '{meant}'"):
        load(given)


def test_file_that_is_no_table_is_an_error(tmp_path):
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"a table \(.csv, .tsv, .parquet, .pq\), but got the file"):
        load(path)


@pytest.mark.parametrize(
    ("source", "options", "name"),
    [
        ("digits", {"target": "y"}, "target"),
        ("digits", {"folder": "x"}, "folder"),
        ("fashion-mnist", {"image_size": 32}, "image_size"),
        ("fashion-mnist", {"missing": "drop"}, "missing"),
    ],
)
def test_option_of_another_kind_of_data_is_an_error(source, options, name):
    with pytest.raises(UserError, match=f"{name} is not an option of {source}; leave it out"):
        load(source, **options)


def test_options_of_folders_and_tables_do_not_mix(image_folder, tmp_path):
    with pytest.raises(UserError, match="standardize is not an option of"):
        load(image_folder({"a": 1}), standardize=False)
    path = tmp_path / "t.csv"
    path.write_text("a,target\n1,2\n")
    with pytest.raises(UserError, match="skip_unreadable is not an option of"):
        load(path, skip_unreadable=True)
