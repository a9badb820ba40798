"""A run: the loop, what goes on around its steps, its workdir and its other processes."""
