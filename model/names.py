"""Names that a config may choose from, without torch, so that a mistake in a config is answered at once."""

from typing import Literal

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"
]
"""Encoders; the table is ENCODERS in model/encoder.py."""

Stem = Literal["small", "imagenet"]
"""First layers of a ResNet; their strides are STEM_STRIDES in model/sizes.py."""

Modulation = Literal["shared", "sectioned"]
"""Ways in which the latent modulates the decoder's layers (model/decoder.py)."""

Initialization = Literal["default", "paper"]
"""Initial weights (model/initialization.py)."""

Schedule = Literal["linear", "cosine", "inverted_cosine", "linear_alphas_cumprod"]
"""Noise schedules; the table is SCHEDULES in model/diffusion.py."""
