"""Where compiled programs are kept, and that nothing fails where they cannot be."""

import pathlib

import jax
import pytest

from janus_jax import compilation_cache


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_below_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "janus_jax")


def test_without_a_home(monkeypatch):
    """HOME unset and a user number without a name, as in `docker run --user 12345`."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("home", ["/proc/self/none", "/dev/null", ""])
def test_where_nothing_can_be_written(monkeypatch, home, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", home or str(tmp_path / "file" / "below"))
    (tmp_path / "file").touch()
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
