"""Watching a run: where its metrics go besides the workdir, and what can be known before it starts."""
