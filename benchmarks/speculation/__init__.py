"""What it brings to give a pass of the model several guessed codes of an image."""
