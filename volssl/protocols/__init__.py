"""Shelf of evaluation protocols, one per file: what is scored, and what an empty or missed structure scores."""
