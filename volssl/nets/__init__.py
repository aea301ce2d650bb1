"""Shelf of backbones, one per file. A recipe names the file; RECIPE_NAME in it names the class."""
