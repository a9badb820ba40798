"""The training step, and the state that it updates."""
