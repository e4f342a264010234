"""Teachers as other libraries' files, and the check that they compute the same."""
