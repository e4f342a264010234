"""Sample lists and Parquet shards made from slides, for the commands in prepatching_scripts."""
