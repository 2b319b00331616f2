"""Errors that a user can cause and mend."""


class UserError(Exception):
    """A mistake in what the user gave: the message is one line (what, where, what to do).

    Entry points print the message without a traceback and exit with code 2.
    """


def first_line(error: Exception) -> str:
    """What a library's error says, as part of a line of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
