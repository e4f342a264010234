"""Interfaces of other code bases, kept so that what was written for them goes on working."""
