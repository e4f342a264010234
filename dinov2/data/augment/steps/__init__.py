"""Augmentation steps, one per file; `dinov2.extensions.AUGMENTATIONS` names them."""
