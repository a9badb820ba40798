"""From items to the model's replies: planned, answered, and kept on disk."""
