"""Benchmarks against ``torch.nn``: ``pytest bench``. See README.md here."""
