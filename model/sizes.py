"""Sizes and counts that follow from the settings of encoder and decoder, without torch."""

import math

from model.names import Modulation, Stem

STEM_STRIDES: dict[Stem, tuple[int, int]] = {"small": (1, 1), "imagenet": (2, 2)}  # convolution, max-pooling
GROUP_STRIDES = (1, 2, 2, 2)  # of the first block of each of a ResNet's four groups


def last_strided_input(image_size: int, stem: Stem) -> int:
    """Height and width in pixels of the feature map that enters a ResNet's last strided convolution."""
    return math.ceil(image_size / math.prod((*STEM_STRIDES[stem], *GROUP_STRIDES[:-1])))


def num_sections(modulation: Modulation, num_levels: int, num_res_blocks: int) -> int:
    """Sections of the latent: one for each residual block going down and one for the middle; one if it is shared."""
    return 1 if modulation == "shared" else num_levels * num_res_blocks + 1


def resolutions(image_size: int, num_levels: int) -> list[int]:
    """Feature-map sizes of the decoder's levels in pixels, first to last."""
    return [image_size // 2**level for level in range(num_levels)]


def num_decoder_blocks(part: str, num_levels: int, num_res_blocks: int) -> int:
    """Modules in the decoder's `down`, `middle` or `up`, down- and upsampling included."""
    if part == "middle":
        return 2
    per_level = {"down": num_res_blocks, "up": num_res_blocks + 1}[part]
    return per_level * num_levels + num_levels - 1
