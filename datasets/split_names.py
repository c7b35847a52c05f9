"""Names of folders that hold the training or the test images."""

import re
from collections.abc import Iterable

# Folders with the images of a split, in any capitals. If several test folders fit, the first of these words wins.
SPLIT_WORDS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation", "eval")}
SPLIT_NAME = re.compile(r"([a-z]+?)[ _-]?(?:set|split|data|images)?[ _-]?(?:(?:19|20)\d\d)?", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """Returns "train" or "test" if a folder of this name holds a split, and None if it does not."""
    word = _split_word(name)
    return word and word[0]


def split_folders(names: Iterable[str], split: str) -> list[str]:
    """Returns the names of folders that hold `split` ("train" or "test"), the best name first."""
    ranked = [
        (word[1], name != name.lower(), name) for name in names if (word := _split_word(name)) and word[0] == split
    ]
    return [name for *_, name in sorted(ranked)]


def holds_splits(names: Iterable[str]) -> bool:
    """Returns True if the folders of these names are splits, not classes: there is a training and a test folder."""
    return {"train", "test"} <= set(map(split_of, names))


def _split_word(name: str) -> tuple[str, int] | None:
    """Returns ("train" or "test", rank of the word) for the name of a folder with a split, and None for others."""
    matched = SPLIT_NAME.fullmatch(name)
    for split, words in SPLIT_WORDS.items():
        if matched and matched[1].lower() in words:
            return split, words.index(matched[1].lower())
    return None
