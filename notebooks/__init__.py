"""Notebooks, each one idea; README.md lists them. `python -m notebooks.run` runs them and saves their outputs."""
