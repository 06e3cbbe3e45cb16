"""The memory that a process frees: kept for the next step, or handed back to the system."""

import ctypes
import os
import sys

__all__ = ["keep_freed_memory", "keep_freed_memory_unless_told"]

# mallopt(3) of glibc.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4

_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, so that a step need not fetch it anew.

    glibc's allocator, which PyTorch uses on the CPU under Linux, hands large freed blocks back to
    the system, which clears them page by page when the next step asks again: measured, nothing to
    a quarter of a step of training (docs/training-step.md). After this call freed blocks stay for
    reuse, as on a GPU, until the process ends. Its size then falls no more, and its peak is
    higher, the more so the more the sizes of tensors vary. It holds for the whole process, not for
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
    """The same for a command and the processes it starts, unless the user's environment chose."""
    told = any(name in os.environ for name in _VARIABLES)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if keep_freed_memory():
        os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 62))
