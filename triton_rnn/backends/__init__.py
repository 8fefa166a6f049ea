"""The backends: each a module that says what it supports, and does it."""
