"""Potara as a Flower app: see ``docs/deployment.md``."""
