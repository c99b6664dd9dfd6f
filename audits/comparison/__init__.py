"""``privkd compare``: two runs, or two curves, side by side."""
