"""The errors that a user can act on; each message is one line that names the cause and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used: names the file or argument, what was expected and what to do."""


class BackendError(RuntimeError):
    """A backend that was asked for is not in this build or not on this machine: names how to get it."""


class Interrupted(RuntimeError):
    """Work was stopped by a signal after its state was saved: names how to resume."""
