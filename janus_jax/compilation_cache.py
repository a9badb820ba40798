"""Caches compiled programs between runs, so that the second start of a command is fast."""

from __future__ import annotations

import os
import pathlib
import tempfile

import jax


def enable():
    """Caches compiled programs in ~/.cache/janus_jax (or under XDG_CACHE_HOME if that is set).

    JAX_COMPILATION_CACHE_DIR names another folder, or disables the cache if empty. Nothing is cached if there is no
    home, as for an unknown user in a container, or it is not writable. For command lines only: a library leaves such
    settings to its users.
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
