"""Changes to existing models: other layers, or the same layers in another mode."""
