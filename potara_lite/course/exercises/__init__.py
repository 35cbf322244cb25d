"""Checkers for the notebooks' exercises, a file per notebook."""
