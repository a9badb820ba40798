"""Turns raw samples into prepared folders, and those into batches."""
