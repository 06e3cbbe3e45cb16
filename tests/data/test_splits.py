import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normdrop.data.splits import check_split_fraction, stratified_split
from normdrop.errors import UserError

NAMES = [str(i) for i in range(20)]


@given(
    counts=st.lists(st.integers(2, 60), min_size=1, max_size=8),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_split_divides_every_class_in_proportion(counts, fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held = stratified_split(labels, fraction, seed, classes=NAMES)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for c, count in enumerate(counts):
        n = int((labels[held] == c).sum())
        assert 1 <= n <= count - 1
        assert abs(n - count * fraction) <= 1 + 1e-9


def test_split_total_is_the_fraction_of_all():
    labels = np.repeat(np.arange(10), 179)
    _, held = stratified_split(labels, 0.2, 0, classes=NAMES)
    assert len(held) == 358


def test_split_is_a_function_of_seed_and_purpose():
    labels = np.repeat(np.arange(3), 50)
    first = stratified_split(labels, 0.2, 5, classes=NAMES)[1]
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter.
    assert (first == stratified_split(labels, 0.2, 5, classes=NAMES)[1]).all()
    assert (first != stratified_split(labels, 0.2, 6, classes=NAMES)[1]).any()
    other = stratified_split(labels, 0.2, 5, classes=NAMES, purpose="validation")[1]
    assert (first != other).any()


def test_split_of_a_class_with_one_sample_is_an_error():
    with pytest.raises(UserError, match="class '2' has only one sample left where the test split"):
        stratified_split(np.array([0, 0, 1, 1, 2]), 0.5, 0, classes=NAMES)


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 2.0, float("nan")])
def test_fraction_outside_its_limits_is_an_error(value):
    with pytest.raises(UserError, match="test must be a fraction between 0 and 1, but got"):
        check_split_fraction("test", value)
    assert check_split_fraction("validation", 0.0, zero=True) == 0.0
