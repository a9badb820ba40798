"""Reads and writes checkpoints of every kind, and fuses or quantizes parameters."""
