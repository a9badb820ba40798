"""Draws images and answers."""
