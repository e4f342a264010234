"""Path-FM: DINOv2 self-distillation on histology tiles."""

__version__ = "0.1.0"
