"""Models whose images are long enough to measure how fast they are drawn."""
