"""The memory that a process frees: kept for the next step, or handed back to the system."""

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

# mallopt(3) of glibc.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4

_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, so that a step need not fetch it anew.

    glibc's allocator, which PyTorch uses on the CPU under Linux, hands large freed blocks back to
    the system, which clears them page by page when the next step asks again. On the machines where
    it was measured that took a tenth to a third of a step of training. After this call freed
    blocks stay for reuse, as on a GPU, until the process ends: its size then falls no more, and
    its peak grew by 8 % at most (docs/training-step.md). It holds for the whole process, not for
    a model, so :func:`normdrop.convert` does not do it by itself. ``normdrop train`` does, unless
    the environment sets glibc's own variables for it (``MALLOC_TRIM_THRESHOLD_`` and the like).

    Call it before the first step. With another allocator, loaded by ``LD_PRELOAD`` (jemalloc,
    tcmalloc), it changes nothing. Values that are computed do not depend on it.

    Returns:
        True where glibc took the setting; False, without effect, on other systems.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    # No block apart from the heap, which would be unmapped when freed; no end of the heap cut off.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def keep_freed_memory_unless_told() -> None:
    """The same for a command, unless the user chose in the environment."""
    told = any(name in os.environ for name in _VARIABLES)
    if not told and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        keep_freed_memory()
