"""Adapters of the released models, on one device of 16 GB."""
