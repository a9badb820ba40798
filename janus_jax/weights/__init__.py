"""Checkpoints: every kind read, two kinds written, parameters in other forms."""
