"""Small files, written whole or not at all."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
