"""Batch normalization and dropout for PyTorch: fast on CPU, and right where they usually go wrong.

The names below are loaded when first used, so that ``import normdrop`` costs nothing by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "__version__",
    "accumulate",
    "convert",
    "describe",
    "fold",
    "fold_plan",
    "functional",
    "has_kernels",
    "instruction_set",
    "keep_freed_memory",
    "networks",
    "nn",
    "plan",
    "revert",
    "reverted",
]

if TYPE_CHECKING:
    from normdrop import functional, networks, nn
    from normdrop.errors import UserError
    from normdrop.inspection.describe import describe
    from normdrop.memory.allocator import keep_freed_memory
    from normdrop.ops import has_kernels, instruction_set
    from normdrop.surgery.accumulate import accumulate
    from normdrop.surgery.convert import convert, revert, reverted
    from normdrop.surgery.fold import fold, fold_plan
    from normdrop.surgery.plan import plan

_HOME = {
    "UserError": "normdrop.errors",
    "accumulate": "normdrop.surgery.accumulate",
    "convert": "normdrop.surgery.convert",
    "describe": "normdrop.inspection.describe",
    "fold": "normdrop.surgery.fold",
    "fold_plan": "normdrop.surgery.fold",
    "functional": "normdrop",
    "has_kernels": "normdrop.ops",
    "instruction_set": "normdrop.ops",
    "keep_freed_memory": "normdrop.memory.allocator",
    "networks": "normdrop",
    "nn": "normdrop",
    "plan": "normdrop.surgery.plan",
    "revert": "normdrop.surgery.convert",
    "reverted": "normdrop.surgery.convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normdrop' has no attribute {name!r}")
    home = _HOME[name]
    value = (
        import_module(f"normdrop.{name}")
        if home == "normdrop"
        else getattr(import_module(home), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
