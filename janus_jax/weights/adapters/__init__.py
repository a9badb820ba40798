"""Low-rank adapters: which layers they change, their files, and how they join a model's parameters."""
