"""Parquet shards: footers, index, and rows."""
