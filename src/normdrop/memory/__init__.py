"""What a model keeps for backward, and what the process keeps for the next step."""
