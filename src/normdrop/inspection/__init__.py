"""What looks at a model and leaves it as it was."""

from normdrop.inspection.describe import Description, Layer, describe

__all__ = ["Description", "Layer", "describe"]
