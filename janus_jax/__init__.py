"""Janus and Janus-Pro in JAX."""
