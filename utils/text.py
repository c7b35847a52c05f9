"""Small functions for names in messages and comparisons."""

import unicodedata
from collections.abc import Sequence


def compose(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC), the same for all forms in which systems store the name."""
    return unicodedata.normalize("NFC", name)


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Returns the names with commas between them: all, or the first `most` and the number of all."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])}, ... ({len(names):,} in total)"
