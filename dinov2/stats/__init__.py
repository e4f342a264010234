"""Colours of a dataset, to normalise with."""
