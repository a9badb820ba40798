"""What a run's workdir is made of: checkpoints and exports, on disks and in stores, and a lease in a store."""
