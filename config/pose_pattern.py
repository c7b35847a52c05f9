"""Patterns by which the name of an image file gives the angles of its camera, in degrees."""

import re
from string import Formatter

PATTERNS = {"eth80": "{polar}-{azimuth}", "cars3d": "{pitch}-{yaw}"}
"""Patterns of data sets, by the names that data.pose accepts."""

HEIGHTS, TURNS = ("polar", "pitch"), ("azimuth", "yaw")  # pitch = 90 - polar, and yaw is another name of azimuth
SIGN, NUMBER = "[-+]?", r"\d+(?:\.\d+)?"


def is_transforms_file(pose: str) -> bool:
    """Returns True if a value of data.pose is the name of a JSON file that lists the cameras of an object."""
    return pose.endswith(".json")


def check_transforms_file(pose: str) -> None:
    """Raises ValueError, with advice, if the value is not the name of a file alone."""
    if re.search(r"[/\\*?[]", pose):
        raise ValueError(f"{pose} is not the name of a file: write a name without folders, such as transforms.json")


def name_pattern(pose: str) -> re.Pattern[str]:
    """Returns the regular expression of file names without ending, with one named group for each angle.

    Raises ValueError, with advice, if the pattern cannot give the angles of a camera.

    Args:
        pose: a key of PATTERNS, or a pattern with {azimuth} or {yaw} and, if the cameras have different heights,
            {polar} or {pitch}. `*` stands for any text. A number directly after `*` has no sign, because `-` may be a
            separator there.
    """
    advice = f"write a pattern such as {PATTERNS['eth80']} or {PATTERNS['cars3d']}, one of {', '.join(PATTERNS)}, or "
    advice += "the name of a .json file"
    try:
        parts = list(Formatter().parse(PATTERNS.get(pose, pose)))
    except ValueError as error:
        raise ValueError(f"{pose} is not a pattern ({error}): {advice}") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    unknown = [field for field in fields if field not in (*HEIGHTS, *TURNS)]
    if unknown:
        raise ValueError(f"{pose} has the unknown field {{{unknown[0]}}}: {advice}")
    if sum(field in TURNS for field in fields) != 1 or sum(field in HEIGHTS for field in fields) > 1:
        raise ValueError(f"{pose} does not have one azimuth and at most one height: {advice}")
    if any(not literal for literal, field, _, _ in parts[1:] if field is not None):
        raise ValueError(f"{pose} has two angles without a separator: {advice}")
    found = []
    for literal, field, _, _ in parts:
        number = NUMBER if literal.endswith("*") else SIGN + NUMBER
        found.append(re.escape(literal).replace(r"\*", ".*?") + (f"(?P<{field}>{number})" if field else ""))
    return re.compile("".join(found))
