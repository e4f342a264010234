"""The command that rewrites a dataset to small row groups."""
