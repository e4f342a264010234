"""Names under which weights are passed around."""
