"""Tiles cut from slides while training."""
