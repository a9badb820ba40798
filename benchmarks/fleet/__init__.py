"""Preparation by several processes."""
