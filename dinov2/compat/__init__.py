"""The interface of Meta's DINOv2, for code written against it; the import paths known from there lead here."""
