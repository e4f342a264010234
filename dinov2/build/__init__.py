"""Parts of a run from its configuration: data, augmentation, networks."""
