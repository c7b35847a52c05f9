"""Pictures of what a latent encodes, the HTML report, and export of the encoder and of its features.

Packages beyond requirements.txt are imported in the functions that use them. `require` checks that they are installed
before any work starts.
"""

from importlib.util import find_spec

from config.errors import ConfigError


def require(*modules: str) -> None:
    """Raises ConfigError if a module is not installed. The message names all missing modules."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{', '.join(missing)} {verb} not installed: run pip install -r requirements-extra.txt")
