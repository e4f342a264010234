"""The Genomic Data Commons, from which download_tcga.py takes slides."""
