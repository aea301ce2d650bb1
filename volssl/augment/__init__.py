"""Shelf of transforms: all randomness in `sample`, none in `apply`; batched, on the device, one family per file."""
