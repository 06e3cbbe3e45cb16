"""A run of the tests ends by itself, whatever happens in it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

MANY = """
import os
import time

import pytest


@pytest.mark.parametrize("number", range(40))
def test_before(number):
    pass


def test_in_question():
    {}


@pytest.mark.parametrize("number", range(40))
def test_after(number):
    pass
"""


def run(folder, statement, *arguments):
    """A project of 81 tests, run as ``make test`` runs ours, with our settings and two workers."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src").mkdir()
    (folder / "tests").mkdir()
    (folder / "tests" / "test_many.py").write_text(MANY.format(statement))
    found = re.search(r"^PYTEST := \$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.M)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *found[1].split(), *arguments],
        cwd=folder,
        env={**environment, "PYTEST_XDIST_AUTO_NUM_WORKERS": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_worker_that_dies_ends_the_run(tmp_path):
    done = run(tmp_path, "os.abort()")
    assert done.returncode == 1, done.stdout
    assert re.search(r"worker 'gw\d' crashed while running .*test_in_question", done.stdout)


def test_a_test_that_hangs_ends_the_run(tmp_path):
    done = run(tmp_path, "time.sleep(10_000)", "-o", "faulthandler_timeout=1")
    assert done.returncode == 1, done.stdout
    assert re.search(r"worker 'gw\d' crashed while running .*test_in_question", done.stdout)
    assert "Timeout (0:00:01)!" in done.stderr


def test_no_process_is_waited_for_without_a_limit():
    waits = {"subprocess.run", "subprocess.check_call", "subprocess.check_output"}
    unlimited = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                is_wait = name in waits or name.endswith(("process.wait", "process.communicate"))
                if is_wait and "timeout" not in {keyword.arg for keyword in node.keywords}:
                    unlimited.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert unlimited == []
