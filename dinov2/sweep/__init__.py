"""Sweeps: variants of a recipe, each with several seeds, trained one after another and compared."""
