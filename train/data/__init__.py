"""From raw samples over prepared folders to batches."""
