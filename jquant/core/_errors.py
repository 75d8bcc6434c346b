"""What goes wrong, told to the user."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where, what was found, what to do."""


class OutputError(UserError):
    """The output cannot be written: it exists, its folder is missing or read-only, the disk is full."""
