"""Inside ``reverted`` tools give torch's answer, and as is where the table says so."""

import csv
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.checks import tools

RESULTS = Path(tools.__file__).parent.parent / "results" / "tools.csv"
USES = tools.cases(Namespace(quick=False))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def published():
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return {(row["library"], row["asked"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("use", USES, ids=str)
def test_a_tool_gets_torchs_answer_as_the_table_says(use, published):
    (row,) = tools.measure(use, Namespace(quick=True))
    expected = published[use.library, use.what]
    # Another version of the tool may say something else as is, and nothing else inside.
    ways = tools.WAYS if row["version"] == expected["version"] else tools.INSIDE
    assert {way: tools.at_home(row[way]) for way in ways} == {
        way: tools.at_home(expected[way]) for way in ways
    }, row
    assert all(tools.at_home(row[way]) for way in tools.INSIDE), row


def test_a_difference_is_told_in_words():
    import torch

    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    assert tools.difference(other, one) == "off by 0.5 of the largest"
    assert tools.difference([one], [one, one]) == "numbers"
    assert tools.difference({"n": 2, "y": other}, {"n": 2, "y": one}).startswith("y: off by 0.5")
    assert tools.difference({"n": 3}, {"n": 2}) == "n: 3, not 2"
    assert tools.difference(8, 0) == "8, not 0"
    failure = tools.Failure(TypeError("no"))
    assert tools.difference(failure, one) == "TypeError: no"
    assert tools.difference(one, failure) == "numbers"
    assert tools.difference(tools.Failure(ValueError("no")), failure) == "ValueError: no"
    assert tools.difference(failure, failure) == "fails too: TypeError: no"
    assert tools.difference({"n": 2, "y": one + 1e-6}, {"n": 2, "y": one}) == tools.SAME
