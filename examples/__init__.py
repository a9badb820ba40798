"""Whole recipes, small enough to be run: `digits` on real data in minutes, `tiny` in seconds on made-up data."""
