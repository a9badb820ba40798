"""Reads torch's files of tensors without torch."""
