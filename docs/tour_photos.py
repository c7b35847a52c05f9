"""Writes a folder of small images for docs/tour.md: tiles of the two photographs that scikit-learn includes.

python -m docs.tour_photos photos
"""

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

TILE = 40  # pixels


def main(argv: list[str] | None = None) -> None:
    """Writes 160 tiles of each photograph. A file is named by its photograph and a number, such as flower_012.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    found = load_sample_images()
    for path, pixels in zip(found.filenames, found.images, strict=True):
        rows, columns = (size // TILE for size in pixels.shape[:2])
        for index in range(rows * columns):
            top, left = (TILE * place for place in divmod(index, columns))
            tile = Image.fromarray(pixels[top : top + TILE, left : left + TILE])
            tile.save(folder / f"{Path(path).stem}_{index:03d}.png")


if __name__ == "__main__":
    main()
