"""Preparation of data by any number of processes: shares, tasks, encoding on all devices, and the merge."""
