"""Errors that the user of a program can fix."""


class UserError(Exception):
    """Base class. The program prints the message as one line and exits with status 2. The message says what to do."""


class ConfigError(UserError):
    """A mistake in a config file or on the command line."""
