"""Text and pictures into what the model reads."""
