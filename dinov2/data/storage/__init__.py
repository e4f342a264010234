"""Storages: where the files of a dataset lie, and ranged reads of them."""
