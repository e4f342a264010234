"""Probes of a teacher's features: what is measured, on which divisions, and the results."""
