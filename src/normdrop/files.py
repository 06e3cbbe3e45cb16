"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["write_atomically", "write_text"]


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends well, rename it to ``path``.

    The temporary file lies in the same folder, so the rename is atomic; it is flushed to disk
    before. When the block raises, the temporary file is removed and what stood at ``path`` stays.
    A symbolic link is followed. What stands there and is no regular file, such as a device, stays
    what it is, and the content is written into it.

    Args:
        path: where the finished file shall stand. Its folder must exist.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with write_atomically(folder / "note.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    target = Path(os.path.realpath(path))
    is_special = target.exists() and not target.is_file()
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".part", dir=None if is_special else target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if is_special:
            with target.open("wb") as opened:
                opened.write(temporary.read_bytes())
            temporary.unlink()
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads; give them the mode that open() would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all; see :func:`write_atomically`."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
