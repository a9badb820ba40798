"""Computes what a run needs on devices that need not be present; loads no data."""
