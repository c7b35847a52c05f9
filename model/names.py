"""Names that a config can choose from. This module does not import torch, so that config errors appear immediately."""

from typing import Literal

ResNet = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"]
"""Names of torchvision's ResNets."""

WideResNet = Literal["wide_resnet28_1", "wide_resnet28_2", "wide_resnet28_8"]
"""Names of the Wide ResNets for small images: depth and widening factor."""

Architecture = Literal[ResNet, WideResNet]
"""Names of the encoders. ENCODERS in model/build.py maps each name to its class."""

Stem = Literal["small", "imagenet"]
"""Names of the stems, the first layers of a ResNet. STEM_STRIDES in model/sizes.py has their strides."""

Modulation = Literal["shared", "sectioned"]
"""Names of the ways in which the latent modulates the decoder's layers (model/decoder.py)."""

Initialization = Literal["default", "torch", "paper"]
"""Names of the initialisations (model/initialization.py)."""

Schedule = Literal["linear", "cosine", "inverted_cosine", "linear_alphas_cumprod", "geometric"]
"""Names of the noise schedules. SCHEDULES in model/diffusion.py maps each name to its function."""

TimestepSampling = Literal["uniform", "log_snr", "adaptive"]
"""Names of the ways to draw timesteps in training. SAMPLERS in experiment/timesteps.py maps each name to its class."""

Prediction = Literal["eps", "v", "x_start"]
"""Names of the quantities that a decoder can predict. PREDICTIONS in model/diffusion.py defines them."""

Method = Literal["probe", "finetune", "laplacenet"]
"""Names of the ways to train a classifier with few labels. METHODS in transfer/methods.py maps each to its class."""
