"""Patches cut from slides while training."""
