"""One engine for many requests: questions and drawings share the steps of one model."""
