"""Embeddings of images, Parquet rows and slides as files."""
