"""Turns text and images into the model's input."""
