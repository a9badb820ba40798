"""A run: the loop, its callbacks, its workdir and its other processes."""
