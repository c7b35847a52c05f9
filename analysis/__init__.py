"""Pictures of what a latent holds, the report, and the encoder to take away.

What is needed beyond requirements.txt is imported where it is used, once `require` has found it.
"""

from importlib.util import find_spec

from utils.config import ConfigError


def require(*modules: str) -> None:
    """Raise ConfigError where one of these is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        there = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{', '.join(missing)} {there} missing: pip install -r requirements-extra.txt")
