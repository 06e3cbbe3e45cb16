"""The operators: kernels where they exist, plain PyTorch elsewhere.

Every operator has one file in this folder and one of the same stem in `csrc`. A file has, in this
order, the function that chooses between kernel and reference, the fake kernel (shapes only),
setup_context, backward, and their registration.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module

import torch

__all__ = ["has_kernels"]

OPERATORS = (
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_update",
    "dropout",
    "dropout_into",
)
"""What csrc/library.cpp declares."""

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
"""What NORMDROP_ISA takes: the widest that the kernels may use; csrc/dispatch.h."""


def _load() -> bool:
    """Load the compiled kernels, which registers torch.ops.normdrop; say so once if there are none.

    NORMDROP_KERNELS=0 in the environment does without them, NORMDROP_KERNELS=<path> loads a build
    that lies elsewhere (a sanitized one).
    """
    wanted = os.environ.get("NORMDROP_KERNELS", "1")
    if wanted == "0":
        return False
    isa = os.environ.get("NORMDROP_ISA", "avx512")
    if isa not in INSTRUCTION_SETS:
        warnings.warn(
            f"normdrop: NORMDROP_ISA must be one of {', '.join(INSTRUCTION_SETS)}, got {isa!r}; "
            "taking the widest that the processor has",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        if wanted == "1":
            import_module("normdrop._C")
        else:
            torch.ops.load_library(wanted)
        # A build that is older than these files would fail later, and less clearly.
        missing = [name for name in OPERATORS if not hasattr(torch.ops.normdrop, name)]
        if missing:
            raise ImportError(f"the build is outdated: it has no {', '.join(missing)}")
    except (ImportError, OSError) as error:
        warnings.warn(
            f"normdrop: the compiled kernels are missing ({error}); everything works on the "
            "slower plain PyTorch path. To build them: pip install --no-build-isolation normdrop, "
            "with a C++ compiler.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


_HAS_KERNELS = _load()


def has_kernels() -> bool:
    """Whether the compiled kernels are loaded; without them the plain PyTorch path is taken."""
    return _HAS_KERNELS
