"""Forwards as graphs: tracing them, what is found in them, and the code that takes their place."""
