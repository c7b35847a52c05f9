"""HTML files of the reports: templates, and images that are part of the file."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

LOSSLESS = 64  # longest side in pixels of an image that is stored without loss


def render(template: str, **values: Any) -> str:
    """Returns a template of this folder, filled with `values`. Raises an error if the template needs another value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template(template).render(**values)


def data_uri(image: Tensor, lossless: bool = False) -> str:
    """Encodes an image (3, H, W) uint8 as a data URI.

    The format is PNG if `lossless` is set or no side is longer than LOSSLESS pixels, otherwise JPEG.
    """
    out = io.BytesIO()
    lossless = lossless or max(image.shape[1:]) <= LOSSLESS
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, format="PNG" if lossless else "JPEG", quality=90)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
