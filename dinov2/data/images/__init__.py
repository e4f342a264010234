"""Collections of images: folders, tables of paths, tar shards, zip archives and HDF5 files."""
