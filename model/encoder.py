"""The image encoder: its interface, and ResNets built from torchvision's blocks with a configurable width and stem."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.names import Architecture, Stem
from model.sizes import GROUP_STRIDES, STEM_STRIDES

# (type of block, number of blocks in each group, torchvision's `base_width` of a bottleneck)
ARCHITECTURES: dict[Architecture, tuple[type[BasicBlock] | type[Bottleneck], list[int], int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 64),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 128),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 128),
}


class Encoder(nn.Module):
    """Interface of an encoder. SODA, the evaluation and the exports use only these attributes and methods.

    The parameters of an encoder are trained with `optimizer.encoder_lr`. ENCODERS maps a name to the class. The class
    is called with the keys of the config's `encoder` section.

    Attributes:
        latent_dim: width of z.
        pooled_dim: width of the features before the layer that computes z.
    """

    latent_dim: int
    pooled_dim: int

    def forward(self, x_source: Tensor) -> Tensor:
        """Returns z (N, latent_dim) for images (N, 3, H, W).

        The images are normalised by the data set's mean and standard deviation.
        """
        raise NotImplementedError

    def features(self, x_source: Tensor) -> dict[str, Tensor]:
        """Returns {"pooled": (N, pooled_dim), "z": (N, latent_dim)} for images (N, 3, H, W), for the evaluation."""
        raise NotImplementedError


class ResNetEncoder(Encoder):
    """ResNet that maps x_source to z (He et al. 2016, Zagoruyko & Komodakis 2016).

    The state_dict keys and the initialisation are those of torchvision.

    Args:
        architecture: a key of ARCHITECTURES. The names are torchvision's.
        stem: `small` is a 3x3 convolution with stride 1 and without max-pooling, for images of about 32 px;
            `imagenet` is a 7x7 convolution with stride 2, followed by max-pooling.
        width: channels of the first group of blocks. Each following group has twice as many. Standard ResNets have 64.
            Bottleneck blocks output four times as many.
        latent_dim: width of z.
    """

    def __init__(self, *, architecture: Architecture, stem: Stem, width: int, latent_dim: int) -> None:
        super().__init__()
        block, depths, bottleneck = ARCHITECTURES[architecture]
        stride, pool_stride = STEM_STRIDES[stem]
        if stem == "small":
            self.conv1 = nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=stride, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=pool_stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)

        channels, groups = width, []
        for group, depth in enumerate(depths):
            planes = width * 2**group
            blocks = []
            for index in range(depth):
                stride = GROUP_STRIDES[group] if index == 0 else 1
                downsample = None
                if stride != 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride=stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(block(channels, planes, stride, downsample, base_width=bottleneck))
                channels = planes * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.pooled_dim, self.latent_dim = channels, latent_dim
        self.fc = nn.Linear(channels, latent_dim)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, x_source: Tensor) -> Tensor:
        """Returns the globally averaged features before the last layer: (N, 3, H, W) -> (N, pooled_dim)."""
        h = self.maxpool(F.relu(self.bn1(self.conv1(x_source))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))  # (N, pooled_dim, h, w)
        return h.mean(dim=(2, 3))

    def forward(self, x_source: Tensor) -> Tensor:
        """Returns z (N, latent_dim) for images (N, 3, H, W).

        The images are normalised by the data set's mean and standard deviation.
        """
        return self.fc(self.pooled(x_source))

    def features(self, x_source: Tensor) -> dict[str, Tensor]:
        """Returns {"pooled": (N, pooled_dim), "z": (N, latent_dim)} for images (N, 3, H, W), for the evaluation."""
        pooled = self.pooled(x_source)
        return {"pooled": pooled, "z": self.fc(pooled)}


ENCODERS: dict[Architecture, type[Encoder]] = dict.fromkeys(ARCHITECTURES, ResNetEncoder)
"""Encoder class of each value of `encoder.architecture`."""
