"""Clients and their examples: splits, partitions, text as tokens, readers of task files."""
