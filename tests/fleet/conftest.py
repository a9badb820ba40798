"""A processor, and captions with their pictures, as for the tests of one process."""

from tests.data.conftest import captions, processor

__all__ = ["captions", "processor"]
