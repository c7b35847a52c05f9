"""SODA: the encoder and the decoder as one module."""

from typing import Self

from torch import Tensor, nn

from model.decoder import UNetDecoder
from model.encoder import Encoder


class SODA(nn.Module):
    """prediction = decoder(x_t, timesteps, z), z = mean of encoder(source view) (Hudson et al., CVPR 2024, figure 2).

    The decoder receives the source view only through z. Therefore, the denoising loss determines what z encodes.
    """

    def __init__(self, encoder: Encoder, decoder: UNetDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self._frozen_encoder = False

    def freeze_encoder(self) -> None:
        """Keeps the encoder without gradients and in evaluation mode, so that BatchNorm uses its running statistics."""
        self._frozen_encoder = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode, except for a frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        if self._frozen_encoder:
            self.encoder.eval()
        return self

    def forward(self, x_source: Tensor, x_t: Tensor, timesteps: Tensor, drop_mask: Tensor) -> Tensor:
        """Denoises x_t, given source views of the same image.

        Args:
            x_source: (N, K, 3, S, S) source views, normalised.
            x_t: (N, 3, D, D) noised target view. D need not be S.
            timesteps: (N,) int64.
            drop_mask: (N, sections) bool. True replaces a section of the sample's latent by zeros (layer masking, SODA,
                section 3). A row of True gives the null latent. The decoder must be trained with the null latent for
                classifier-free guidance.

        Returns:
            The prediction (N, 3, D, D): eps, or another quantity of `diffusion.prediction`.
        """
        z = self.encode(x_source)  # (N, latent_dim)
        return self.decoder(x_t, timesteps, self.decoder.mask(z, drop_mask))

    def encode(self, x_source: Tensor) -> Tensor:
        """Returns z (N, latent_dim), the mean of the latents of K source views (N, K, 3, S, S)."""
        latents = self.encoder(x_source.flatten(0, 1))  # (N * K, latent_dim)
        return latents.unflatten(0, x_source.shape[:2]).mean(dim=1)
