"""Environment variables that turn something on or off."""

import os

_OFF = ("0", "false", "off", "no")


def is_on(variable: str, default: bool) -> bool:
    """Whether a variable says so; `default` where it is not set, or empty."""
    value = os.environ.get(variable, "").strip().lower()
    return value not in _OFF if value else default
