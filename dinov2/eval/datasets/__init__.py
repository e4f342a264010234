"""Tiles with labels, splits and patients, from folders, tables, shards and public benchmarks."""
