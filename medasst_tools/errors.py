"""The two ways in which a command ends badly. Modules raise; only `cli.py` turns an error into a line and a status."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the value and the next step; exit status 2."""


class CheckFailed(Exception):
    """A check that the user asked for found something; exit status 1."""
