"""Multi-crop augmentation, masks and batches of one process."""
