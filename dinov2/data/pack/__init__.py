"""Parquet shards made of a dataset of any kind."""
