"""Compiled programs kept between runs, so that the second start of a command is fast."""

from __future__ import annotations

import os
import pathlib

import jax


def enable():
    """Keeps compiled programs in ~/.cache/janus_jax (under XDG_CACHE_HOME where that is set).

    JAX_COMPILATION_CACHE_DIR names another folder, or none where it is empty. For command lines: a library leaves such
    settings to who uses it.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "janus_jax"))
