"""Engines: token ids in, token ids out. `base.py` is the contract, the other modules implement it."""
