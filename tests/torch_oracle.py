"""torch and transformers, for test modules that need them throughout.

Where they are not installed, the whole module that imports from here is skipped, and told by the name of what is
missing. A module that compares with them here and there takes the fixture `oracle` instead.
"""

import pytest

torch = pytest.importorskip("torch", exc_type=ModuleNotFoundError)
transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)

from safetensors.torch import load_file, save_file  # noqa: E402

__all__ = ["load_file", "save_file", "torch", "transformers"]
