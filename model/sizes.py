"""Sizes and numbers of modules, computed from the config of the encoder and decoder without importing torch."""

import math
from typing import get_args

from model.names import Architecture, Modulation, Stem, WideResNet

STEM_STRIDES: dict[Stem, tuple[int, int]] = {"small": (1, 1), "imagenet": (2, 2)}  # convolution, max-pooling
GROUP_STRIDES = (1, 2, 2, 2)  # stride of the first block in each of a ResNet's four groups
WIDE_GROUP_STRIDES = (1, 2, 2)  # the same for the three groups of a WideResNet, whose stem has stride 1


def last_strided_input(image_size: int, architecture: Architecture, stem: Stem) -> int:
    """Returns the height and width in pixels of the feature map that enters an encoder's last strided convolution."""
    is_wide = architecture in get_args(WideResNet)
    strides = WIDE_GROUP_STRIDES if is_wide else (*STEM_STRIDES[stem], *GROUP_STRIDES)
    return math.ceil(image_size / math.prod(strides[:-1]))


def num_sections(modulation: Modulation, num_levels: int, num_res_blocks: int) -> int:
    """Returns the number of sections of the latent.

    With `sectioned` modulation, there is one section for each residual block in the downward path and one for the
    middle. With `shared` modulation, there is one section in total.
    """
    return 1 if modulation == "shared" else num_levels * num_res_blocks + 1


def resolutions(image_size: int, num_levels: int) -> list[int]:
    """Returns the feature-map sizes of the decoder's levels in pixels, first to last."""
    return [image_size // 2**level for level in range(num_levels)]


def num_decoder_modules(part: str, num_levels: int, num_res_blocks: int) -> int:
    """Returns the number of modules in `down`, `middle` or `up` of the decoder, including down- and upsamplings.

    `part` is the name of one of these three module lists.
    """
    if part == "middle":
        return 2
    per_level = {"down": num_res_blocks, "up": num_res_blocks + 1}[part]
    return per_level * num_levels + num_levels - 1
