"""Errors that a user can cause and correct."""


class UserError(Exception):
    """A mistake in what the user gave: the message is one line (what, where, what to do).

    Entry points print the message without a traceback and exit with code 2.
    """


class OptionError(UserError):
    """A mistake in a command's options, which a launcher gives to all ranks alike."""


class DisagreementError(UserError):
    """Ranks were not started alike. The message names them, and every rank raises it."""


class FailedCheckError(Exception):
    """What runs is wrong. The message is one line that names the rank, and every rank raises it."""


def first_line(error: Exception) -> str:
    """The first line of a library's error, to quote in a message; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
