"""The operators: kernels where they exist, plain PyTorch elsewhere.

An operator with a kernel has a file in this folder and a folder of that name in `csrc`. The file
has, in this order, the function that chooses between kernel and torch, the fake kernel (shapes
only), setup_context, backward, and their registration. Second derivatives, and what needs no kernel
of ours (`linear`, `shortcut`), have files of their own; `context` says who looks on.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path

import torch

__all__ = ["has_kernels", "instruction_set"]

OPERATORS = {
    "batch_norm": "x running_mean running_var weight bias residual training eps slope "
    "seed threshold drop_scale sample_offset -> 4",
    "batch_norm_backward": "grad_y x mean var weight bias positive training eps slope "
    "need_x need_vectors need_residual seed threshold drop_scale sample_offset -> 4",
    "batch_norm_update": "running_mean running_var mean var count momentum nonfinite -> 0",
    "conv2d": "x weight bias -> 1",
    "conv2d_backward": "grad_y x weight need_x need_weight -> 2",
    "dropout": "x seed threshold scale shift fill sample_offset shared_dims -> 1",
    "dropout_into": "x seed threshold scale shift fill sample_offset shared_dims y -> 0",
    "instruction_set": "-> 1",
}
"""What csrc/library.cpp declares: the arguments' names, and how many tensors come back."""

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
"""What NORMDROP_ISA takes: the widest that the kernels may use; csrc/base/dispatch.h."""


def _signature(name: str) -> str | None:
    """What the loaded library declares, in the form of OPERATORS."""
    try:
        schema = getattr(torch.ops.normdrop, name).default._schema
    except AttributeError:
        return None
    return " ".join([*(a.name for a in schema.arguments), f"-> {len(schema.returns)}"])


def _warn(what: str, remedy: str) -> None:
    package = Path(__file__).parents[1]
    if (package / "csrc").is_dir():  # a checkout; nothing that is installed has the sources
        command = f"pip install --no-build-isolation -e . in {package.parents[1]}"
    else:
        command = "pip install --no-build-isolation --force-reinstall --no-deps normdrop"
    warnings.warn(
        f"normdrop: {what}; everything works on the slower plain PyTorch path. "
        f"{remedy}: {command}, with a C++ compiler.",
        RuntimeWarning,
        stacklevel=3,
    )


def _load() -> bool:
    """Load the compiled kernels, which registers torch.ops.normdrop; say once what is amiss.

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
    except (ImportError, OSError) as error:
        _warn(f"the compiled kernels are missing ({error})", "To build them")
        return False
    # A build that is older than these files would fail at the first call, and less clearly.
    if others := [name for name, wanted in OPERATORS.items() if _signature(name) != wanted]:
        _warn(
            "the build of the compiled kernels is outdated: it has no "
            f"{', '.join(others)} as this version calls it",
            "Rebuild with",
        )
        return False
    return True


_HAS_KERNELS = _load()


def has_kernels() -> bool:
    """Whether the compiled kernels are loaded; without them the plain PyTorch path is taken."""
    return _HAS_KERNELS


def instruction_set() -> str | None:
    """What the kernels compute with here: "baseline", "avx2" or "avx512"; None without kernels.

    "baseline" is what every processor of the architecture has: SSE2, or NEON on ARM.
    """
    return INSTRUCTION_SETS[torch.ops.normdrop.instruction_set()] if _HAS_KERNELS else None
