"""The image encoders: ResNets from torchvision's blocks with any width and stem, and Wide ResNets."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.encoder import Encoder
from model.names import ResNet, Stem, WideResNet
from model.rays import ImageConv2d
from model.sizes import GROUP_STRIDES, STEM_STRIDES, WIDE_GROUP_STRIDES

# (type of block, number of blocks in each group, torchvision's `base_width` of a bottleneck)
ARCHITECTURES: dict[ResNet, tuple[type[BasicBlock] | type[Bottleneck], list[int], int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 64),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 128),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 128),
}
WIDENING: dict[WideResNet, int] = {"wide_resnet28_1": 1, "wide_resnet28_2": 2, "wide_resnet28_8": 8}


class ResNetEncoder(Encoder):
    """ResNet that maps x_source to z (He et al. 2016; the wide ones: Zagoruyko & Komodakis 2016).

    The state_dict keys and the initialisation are those of torchvision.

    Args:
        architecture: a key of ARCHITECTURES. The names are torchvision's.
        stem: `small` is a 3x3 convolution with stride 1 and without max-pooling, for images of about 32 px;
            `imagenet` is a 7x7 convolution with stride 2, followed by max-pooling.
        width: channels of the first group of blocks. Each following group has twice as many. Standard ResNets have 64.
            Bottleneck blocks output four times as many.
        latent_dim: width of z.
        probabilistic: True: the encoder gives a normal distribution of z.
        log_sigmas: see `Encoder.add_head`.
        ray_octaves: octaves of the encoding of rays (model/rays.py); None: images have no rays.
    """

    def __init__(
        self,
        *,
        architecture: ResNet,
        stem: Stem,
        width: int,
        latent_dim: int,
        probabilistic: bool = False,
        log_sigmas: Tensor | None = None,
        ray_octaves: int | None = None,
    ) -> None:
        super().__init__()
        block, depths, bottleneck = ARCHITECTURES[architecture]
        stride, pool_stride = STEM_STRIDES[stem]
        if stem == "small":
            self.conv1 = ImageConv2d(width, 3, stride=stride, padding=1, bias=False, ray_octaves=ray_octaves)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = ImageConv2d(width, 7, stride=stride, padding=3, bias=False, ray_octaves=ray_octaves)
            self.maxpool = nn.MaxPool2d(3, stride=pool_stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)

        channels, groups, block_inputs = width, [], []
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
                block_inputs.append(channels)
                channels = planes * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.add_head(channels, latent_dim, probabilistic, block_inputs, log_sigmas)
        initialize_convolutions(self)

    def feature_map(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the output of the last block: (N, 3, H, W) -> (N, pooled_dim, h, w)."""
        h = self.maxpool(F.relu(self.bn1(self.conv1(x_source))))
        return self.through(h, [self.layer1, self.layer2, self.layer3, self.layer4], timesteps)


class PreActivationBlock(nn.Module):
    """Residual block x + conv2(relu(bn2(conv1(relu(bn1(x)))))) with 3x3 convolutions (He et al. 2016, v2).

    If the number of channels changes, the skip connection is a 1x1 convolution of relu(bn1(x)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / stride, W / stride) for x (N, C_in, H, W)."""
        h = F.relu(self.bn1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class WideResNetEncoder(Encoder):
    """Wide ResNet of 28 layers for images of about 32 px (Zagoruyko & Komodakis 2016, WRN-28-k without dropout).

    A 3x3 convolution with 16 channels is followed by three groups of four pre-activation blocks with 16k, 32k and 64k
    channels, and by BatchNorm, ReLU and the mean over the pixels.

    Args:
        architecture: a key of WIDENING, which gives k.
        stem, width: not used. The architecture determines both.
        latent_dim: width of z.
        probabilistic: True: the encoder gives a normal distribution of z.
        log_sigmas: see `Encoder.add_head`.
        ray_octaves: octaves of the encoding of rays (model/rays.py); None: images have no rays.
    """

    def __init__(
        self,
        *,
        architecture: WideResNet,
        stem: Stem,
        width: int,
        latent_dim: int,
        probabilistic: bool = False,
        log_sigmas: Tensor | None = None,
        ray_octaves: int | None = None,
    ) -> None:
        super().__init__()
        channels, groups, block_inputs = 16, [], []
        self.conv1 = ImageConv2d(channels, 3, padding=1, bias=False, ray_octaves=ray_octaves)
        for group, stride in enumerate(WIDE_GROUP_STRIDES):
            planes = 16 * WIDENING[architecture] * 2**group
            blocks = [PreActivationBlock(channels, planes, stride)]
            blocks += [PreActivationBlock(planes, planes, 1) for _ in range(3)]
            groups.append(nn.Sequential(*blocks))
            block_inputs += [channels, planes, planes, planes]
            channels = planes
        self.layer1, self.layer2, self.layer3 = groups
        self.bn = nn.BatchNorm2d(channels)
        self.add_head(channels, latent_dim, probabilistic, block_inputs, log_sigmas)
        initialize_convolutions(self)

    def feature_map(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the output of the last ReLU: (N, 3, H, W) -> (N, pooled_dim, H / 4, W / 4)."""
        h = self.through(self.conv1(x_source), [self.layer1, self.layer2, self.layer3], timesteps)
        return F.relu(self.bn(h))


def initialize_convolutions(module: nn.Module) -> None:
    """Draws the weights of all convolutions of `module` as torchvision's ResNets do (He et al. 2015, fan-out)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
