"""Shelf of self-supervised methods, one complete method per file."""
