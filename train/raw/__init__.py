"""Reads users' training data, in many formats, into raw samples."""
