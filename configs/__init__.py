"""One file per run, each with `get_config()`; found by name with `python -m train.main --config NAME`."""
