"""What a user sees first: the names, the version, the cost of importing."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import normdrop

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", normdrop.__all__)
def test_public_names_are_there(name):
    assert getattr(normdrop, name) is not None
    assert name in dir(normdrop)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'batchnorm'"):
        _ = normdrop.batchnorm


def test_version_is_kept_once():
    assert importlib.metadata.version("normdrop") == normdrop.__version__
    assert f"## {normdrop.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_normdrop_does_not_import_torch():
    """`normdrop --help` is quick because of it."""
    code = "import normdrop, normdrop.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0


def test_core_needs_torch_alone():
    """The core imports in a process where the packages of the extras cannot be found."""
    code = """
import importlib.machinery, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "pandas", "sklearn", "matplotlib", "PIL", "pytorch_lightning", "jsonargparse",
            "rich", "safetensors", "jinja2", "yaml",
        }:  # torch asks whether pandas is there, but does not import it
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name)
sys.meta_path.insert(0, Refuse())
import torch, normdrop
from normdrop import functional, inspection, networks, nn, ops
normdrop.describe(networks.resnet(8, classes=2), (3, 16, 16))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=600)
