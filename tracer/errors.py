"""The one exception for mistakes a user can mend: a single line that names the thing and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, named in one line together with what to do; the command line prints only that line."""
