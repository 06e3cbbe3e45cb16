"""The documents about the lecture: their examples run, and what they name exists."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import normdrop
from normdrop import networks

_DOCS = Path(__file__).parents[2] / "docs"
_NAMES = ("batch-normalization.md", "residual-networks.md")


@pytest.mark.parametrize("name", _NAMES)
def test_examples_give_what_is_shown(name: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    path = str(_DOCS / name)
    result = doctest.testfile(path, module_relative=False, optionflags=flags, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", _NAMES)
def test_every_function_that_is_named_with_a_file_is_in_it(name: str) -> None:
    text = (_DOCS / name).read_text(encoding="utf-8")
    named = re.findall(r"((?:`\w+`, )*`\w+`) in \[[^]]+\]\(([^)]+)\)", text)
    assert named
    for names, path in named:
        source = (_DOCS / path).read_text(encoding="utf-8")
        for one in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{one}\b", source), f"{one} is not in {path}"


@pytest.mark.parametrize("name", _NAMES)
def test_links_to_files_lead_somewhere(name: str) -> None:
    text = (_DOCS / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (_DOCS / link).exists(), link


def test_the_table_of_networks_is_what_describe_counts() -> None:
    text = (_DOCS / "residual-networks.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+)×\d+ \| ([\d.]+) M \| ([\d,]+) \| ([\d,]+) \| ([\d.,]+) ([MG]) \|",
        text,
        re.MULTILINE,
    )
    assert len(rows) == 16
    # The deep ones take long and differ in nothing else.
    for name, side, theta, nodes, gamma_alpha, products, unit in rows:
        if name in ("resnet101", "resnet152", "resnet110", "vgg19"):
            continue
        with torch.device("meta"):
            classes = 10 if side == "32" else 1000
            shape = (3, int(side), int(side))
            network = networks.build(name, classes=classes, input_shape=shape)
        found = normdrop.describe(network, shape)
        assert f"{found.theta / 1e6:.2f}" == theta
        assert f"{found.norm_nodes:,}" == nodes
        assert f"{found.gamma_alpha:,}" == gamma_alpha
        scale = 1e6 if unit == "M" else 1e9
        assert f"{found.multiply_adds / scale:,.{0 if unit == 'M' else 2}f}" == products
