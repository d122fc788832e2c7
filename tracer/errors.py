"""The exception for mistakes that a user of the command line can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input in the rooms behind the command line, which prints its one line; the library raises ValueError."""
