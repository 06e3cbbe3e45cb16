"""Training: recipes, the task, fitting, evaluation and prediction; needs ``normdrop[train]``."""
