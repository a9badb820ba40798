"""Benchmarks of drawing: prompts, folders that the official scorers read, and verdicts on what a detector has seen."""
