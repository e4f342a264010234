"""The command that looks at a dataset before it is trained on."""
