"""The operators: kernels where they exist, plain PyTorch elsewhere."""

__all__ = ["has_kernels"]


def has_kernels() -> bool:
    """Whether the compiled kernels are loaded; without them the plain PyTorch path is taken."""
    return False
