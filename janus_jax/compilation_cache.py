"""Compiled programs kept between runs, so that the second start of a command is fast."""

from __future__ import annotations

import os
import pathlib
import tempfile

import jax


def enable():
    """Keeps compiled programs in ~/.cache/janus_jax (under XDG_CACHE_HOME where that is set).

    JAX_COMPILATION_CACHE_DIR names another folder, or none where it is empty. Nothing is kept where there is no home,
    as for an unknown user in a container, or no writing in it. For command lines: a library leaves such settings to who
    uses it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(home) / "janus_jax"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # the latter from `home`, of a user without a name
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
