"""Every snippet in the README and in docs/ runs, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from normdrop import cli, flags

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(document, *languages):
    found = SNIPPET.findall(document.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def commands(document):
    """The shell lines of a document, without comments and line continuations."""
    lines = "\n".join(snippets(document, "bash", "sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


WITH_PYTHON = [d for d in DOCUMENTS if snippets(d, "python")]


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda d: d.name)
def test_python_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    for code in snippets(document, "python"):
        exec(compile(code, document.name, "exec"), names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_commands_are_ones_that_exist(document, monkeypatch):
    """`make` lines name targets, `normdrop` lines parse: no option was renamed under them."""
    for words in commands(document):
        if words[0] == "make":
            targets = [w for w in words[1:] if "=" not in w]
            listed = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(targets) <= set(listed), words
        elif words[0] == "normdrop" and words[1:2] == ["train"]:
            monkeypatch.chdir(ROOT)  # where recipes/ lies
            flags.parse(cli.train, words[2:], prog="normdrop train")


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    """The README's own run, at one epoch: train, evaluate, describe."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands(ROOT / "README.md"):
        if words[:4] == ["normdrop", "train", "--data", "digits"]:
            assert cli.main([*words[1:], "--epochs", "1"]) == 0
        elif words[:2] in (["normdrop", "evaluate"], ["normdrop", "describe"]):
            assert cli.main(words[1:]) == 0
        else:
            continue
        ran.append(words[1])
    assert ran == ["train", "evaluate", "describe"]
    assert (tmp_path / "runs" / "first" / "report.html").exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
