"""Errors that a user can cause and mend."""


class UserError(Exception):
    """A mistake in what the user gave: the message is one line (what, where, what to do).

    Entry points print the message without a traceback and exit with code 2.
    """
