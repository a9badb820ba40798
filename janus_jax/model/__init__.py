"""The model: pure functions of arrays, as flax modules."""
