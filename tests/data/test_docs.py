"""docs/your-data.md quotes messages; they are the program's."""

import re
from pathlib import Path

import normdrop.data

DOCS = Path(__file__).parents[2] / "docs" / "your-data.md"


def test_messages_of_your_data_are_the_programs():
    folder = Path(normdrop.data.__file__).parent
    # Neighbouring literals are one sentence.
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = DOCS.read_text(encoding="utf-8").split("## What the errors mean")[1]
    messages = re.findall(r"^\| \*(.*?)\* \|", table, re.M)
    assert len(messages) == 17
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message
