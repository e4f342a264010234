"""The plan of a run: what its step costs, measured on tensors without values, and the batch, memory and time."""
