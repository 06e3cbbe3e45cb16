"""What looks at a model and leaves it as it was."""

from normdrop.inspection.describe import describe
from normdrop.inspection.description import Description, Layer

__all__ = ["Description", "Layer", "describe"]
