"""Pictures of what a latent holds, the report, and the encoder to take away.

Packages beyond requirements.txt are imported where they are used; `require` checks for them before any work.
"""

from importlib.util import find_spec

from config.errors import ConfigError


def require(*modules: str) -> None:
    """Raise ConfigError, naming the missing ones, unless all modules are installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{', '.join(missing)} {verb} missing: pip install -r requirements-extra.txt")
