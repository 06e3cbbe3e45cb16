"""Freed memory is kept where that was asked for."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from normdrop import cli
from normdrop.errors import UserError
from normdrop.memory import allocator

HAS_GLIBC = platform.libc_ver()[0] == "glibc"

# Page faults of writing to 64 MB, 16384 pages, again and again, each time freed in between. Some of
# the first times the heap grows, where something small has come to lie in what was freed.
FAULTS = """
import resource, sys, torch, normdrop
if sys.argv[1] == "keep":
    assert normdrop.keep_freed_memory()
for i in range(60):
    if i == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="another allocator than glibc's")
def test_freed_memory_is_not_fetched_again():
    def faults(how, **environment):
        command = [sys.executable, "-c", FAULTS, how]
        ours = ("MALLOC_", "GLIBC_TUNABLES")
        others = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return int(subprocess.check_output(command, env=others | environment, timeout=600))

    fetched = faults("")
    assert faults("keep") < fetched / 4
    environment = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}
    assert faults("", **environment) < fetched / 4


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False


def test_a_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize(
    ("name", "value", "is_kept"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", False),
        ("MALLOC_MMAP_THRESHOLD_", "131072", False),
        ("MALLOC_MMAP_MAX_", "65536", False),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=65536", False),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0", True),
        ("MALLOC_ARENA_MAX", "2", True),
    ],
)
def test_training_keeps_it_unless_the_environment_says_otherwise(monkeypatch, name, value, is_kept):
    environment = {name: value}
    monkeypatch.setattr(os, "environ", environment)
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: not calls.append(1))
    with pytest.raises(UserError):
        cli.train(cli.DataOptions(data="no-such-data"))
    assert len(calls) == is_kept
    # What it starts is told so, too.
    assert ("MALLOC_MMAP_MAX_" in environment) == (is_kept or name == "MALLOC_MMAP_MAX_")
