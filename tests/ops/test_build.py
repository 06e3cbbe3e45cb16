"""Building, installing and loading the kernels, and doing without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from normdrop.ops import OPERATORS, has_kernels

ROOT = Path(__file__).parent.parent.parent
SMOKE = """
import torch
from normdrop import functional, has_kernels, ops
x = torch.randn(8, 16, 20, 20, requires_grad=True)
y = functional.batch_norm(x, None, None, training=True, activation="relu")
y.sum().backward()
torch.testing.assert_close(
    y, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
)
functional.dropout(x, 0.5).sum().backward()
print("kernels:", has_kernels())
"""


def run(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
        timeout=600,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is needed to build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def build(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=600,
    )


def test_missing_kernels_are_said_once():
    done = run(SMOKE, NORMDROP_KERNELS="/nowhere/_C.abi3.so")
    assert "kernels: False" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert "the compiled kernels are missing" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


# An older build, as its schemas stood before batch normalization took dropout's arguments: today's
# first call would end in "expected at most 9 argument(s) but received 13". Kernels are not needed,
# since nothing may be called; libtorch_cpu.so is a library that loads and declares nothing.
STALE = """
import torch
library = torch.library.Library("normdrop", "DEF")
for schema in {schemas}:
    library.define(schema)
"""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("batch_norm", r"slope, .*\) ->", "slope) ->"),  # fewer arguments
        ("batch_norm", "float slope", "bool relu"),  # as many, of another meaning
        ("batch_norm", ", Tensor positive", ""),  # fewer results
        ("dropout_into", "dropout_into", "dropout_"),  # another operator
    ],
)
def test_outdated_build_is_said_once(name, old, new):
    schemas = declared()
    stale = re.sub(old, new, schemas[name])
    assert stale != schemas[name]
    schemas[name] = stale
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))
    code = STALE.format(schemas=list(schemas.values())) + SMOKE
    done = run(code, NORMDROP_KERNELS=str(library))
    assert "kernels: False" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"the build of the compiled kernels is outdated: it has no {name} as " in done.stderr
    assert f"Rebuild with: pip install --no-build-isolation -e . in {ROOT}," in done.stderr


def declared() -> dict[str, str]:
    """The schemas on the page that lists every operator, by the operators' names."""
    page = (ROOT / "src/normdrop/csrc/library.cpp").read_text()
    calls = re.findall(r'm\.def\(((?:\s*"[^"]*")+)\);', page)
    assert len(calls) == page.count("m.def(")
    schemas = ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]
    return {schema.split("(")[0]: schema for schema in schemas}


def test_python_declares_the_operators_as_the_page_does():
    """Else today's build would count as outdated, or an outdated one as today's."""
    wanted = {}
    for name, text in declared().items():
        schema = torch._C.parse_schema(text)
        names = [argument.name for argument in schema.arguments]
        wanted[name] = " ".join([*names, f"-> {len(schema.returns)}"])
    assert wanted == OPERATORS


def test_kernels_can_be_switched_off():
    assert "kernels: False" in run(SMOKE, "-W", "error", NORMDROP_KERNELS="0").stdout


def test_kernels_are_loaded_without_a_warning():
    assert f"kernels: {has_kernels()}" in run(SMOKE, "-W", "error").stdout


def test_build_without_a_compiler_goes_on_without_kernels(tree):
    compilers = {"CC": "false", "CXX": "false"}
    done = build(tree, "setup.py", "build_ext", "--inplace", **compilers)
    assert done.returncode == 0, done.stderr
    assert "installing without kernels" in done.stderr
    assert not list(tree.glob("src/normdrop/*.so"))
    done = build(
        tree, "setup.py", "build_ext", "--inplace", **compilers, NORMDROP_REQUIRE_KERNELS="1"
    )
    assert done.returncode != 0
    assert "the kernels could not be built" in done.stderr


def test_build_without_torch_gives_a_plain_wheel(tree):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'bdist_wheel']; "
    code += "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    done = build(tree, "-c", code, NORMDROP_REQUIRE_KERNELS="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_wheel_serves_every_python_and_torch(tree, tmp_path_factory):
    """One wheel, installed into a fresh environment, runs an operator there."""
    done = build(
        tree, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", ".",
        NORMDROP_REQUIRE_KERNELS="1", NORMDROP_INSTRUCTION_SETS="baseline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    (wheel,) = tree.glob("dist/*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "normdrop/_C.abi3.so" in names
    assert "normdrop/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]

    # The other packages come from this environment; normdrop must not.
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=600)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        timeout=600,
    )
    code = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    code += SMOKE + f"assert normdrop.__file__.startswith({str(place)!r}), normdrop.__file__"
    code = code.replace("import torch\n", "import normdrop, torch\n")
    done = subprocess.run(
        [python, "-I", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels: True" in done.stdout


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
@pytest.mark.skipif(not has_kernels(), reason="there is no kernel")
def test_extension_names_no_version_of_torch_or_python():
    from normdrop import _C

    dynamic = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True, timeout=600
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
