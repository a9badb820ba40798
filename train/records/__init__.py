"""Records of shard files: their format, how disks and stores serve them, and a cache of what stores have served."""
