"""One module for each paper: its runs and its claims, as declarations."""
