"""Which files this process holds open, and where it may not write."""

import os
import pathlib

import pytest

# Not even root may write there.
needs_sys = pytest.mark.skipif(not os.path.ismount("/sys"), reason="/sys is not mounted")


def open_in(folder: pathlib.Path, suffix: str) -> int:
    """Files of `folder` with `suffix` that this process has open, whatever else opens and closes meanwhile."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            path = pathlib.Path(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # closed since, as the handle that lists them is
            continue
        found += path.parent == folder and path.suffix == suffix
    return found
