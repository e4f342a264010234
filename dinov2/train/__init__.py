"""Training: the self-distillation step, the loop around it, and its command line."""
