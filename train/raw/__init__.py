"""Training data as people have them, to raw samples."""
