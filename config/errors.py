"""Errors that the user of a program can mend."""


class UserError(Exception):
    """Base class: a program prints the message as one line and exits with status 2. The message says what to do."""


class ConfigError(UserError):
    """A mistake in a config file or on the command line."""
