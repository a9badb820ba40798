"""Tar shards of images and captions."""
