"""The error of this room."""


class DataError(ValueError):
    """Bad input data; the message is one line saying what was expected, what was found, and where."""
