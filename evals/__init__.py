"""Benchmarks: `python -m evals.main --tasks pope,mme --model DIR --data FOLDER --out DIR`."""
