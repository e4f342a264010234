"""Small helpers shared by all parts."""
