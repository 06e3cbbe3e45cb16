"""The kernels compiled for 64-bit ARM (NEON), where a cross compiler is installed.

Debian: g++-aarch64-linux-gnu, and qemu-user-static to run what came out.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "src" / "normdrop" / "csrc"
CHECK = Path(__file__).parent / "kernels_check.cpp"
LOOPS = ("dropout/dropout_kernels.cpp", "dropout/transposed_kernels.cpp", "mask/mask_kernels.cpp")
CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = pytest.mark.xdist_group("neon")  # compiled once
needs_cross_compiler = pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++ is here")


def setup_flags() -> list[str]:
    """FLAGS in setup.py, read without running it."""
    flags: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "FLAGS":
                flags += ast.literal_eval(node.value)
    assert {"-Wall", "-Wextra"} <= set(flags)
    return flags


def compile_for(compiler: str, source: Path, target: Path) -> Path:
    command = [compiler, *setup_flags(), "-Werror", "-fPIC", "-DNORMDROP_ISA=baseline"]
    command += [f"-I{SOURCES}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All that is compiled for each instruction set, compiled for ARM without a warning."""
    assert CROSS is not None
    folder = tmp_path_factory.mktemp("aarch64")
    sources = [*sorted(SOURCES.rglob("*_kernels.cpp")), CHECK]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda s: compile_for(CROSS, s, folder / f"{s.stem}.o"), sources)
        return {path.stem: path for path in made}


@needs_cross_compiler
def test_kernels_compile_for_arm_without_warnings(objects):
    assert {"rows_kernels", "columns_kernels", "dropout_kernels"} < objects.keys()
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", objects["dropout_kernels"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    assert "umull\tv" in code  # Philox multiplies in vectors


@needs_cross_compiler
@pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 is here")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_arm_gives_the_same_bits(objects, tmp_path):
    parts = [CHECK, *(SOURCES / name for name in LOOPS)]
    for_arm = tmp_path / "check-arm"
    arm_objects = [str(objects[part.stem]) for part in parts]
    subprocess.run([CROSS, "-static", *arm_objects, "-o", for_arm], check=True, timeout=600)
    here = [compile_for("c++", source, tmp_path / f"{source.stem}.o") for source in parts]
    subprocess.run(["c++", *here, "-o", tmp_path / "check"], check=True, timeout=600)

    def lines(*command: str | Path) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        return done.stdout.splitlines()

    arm, expected = lines(QEMU, for_arm), lines(tmp_path / "check")
    assert len(expected) > 100
    assert arm == expected
    # Memory in any order has one mask, whichever loop walks it.
    loops: dict[str, set[str]] = {}
    for line in expected:
        if line.startswith("any order"):
            case, _, value = line.rpartition(" ")
            loops.setdefault(case, set()).add(value)
    assert len(loops) == 32
    assert all(len(values) == 1 for values in loops.values())
