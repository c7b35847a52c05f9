"""SODA: the encoder and the decoder as one module."""

from functools import partial
from typing import NamedTuple

from torch import Tensor

from model.decoder import UNetDecoder
from model.encoder import Encoder, OnEncoder
from model.guidance import Condition


class Denoised(NamedTuple):
    """Output of a training step's forward pass for N samples with K source views each.

    Attributes:
        prediction: (N, 3, D, D): eps, or another quantity of `diffusion.prediction`.
        latents: (N, K, latent_dim) latents of the source views, or the means of their distributions.
        log_variances: (N, K, latent_dim) log-variances of the distributions; None: the encoder is deterministic.
    """

    prediction: Tensor
    latents: Tensor
    log_variances: Tensor | None


class SODA(OnEncoder):
    """prediction = decoder(x_t, timesteps, z), z = mean of encoder(source view) (Hudson et al., CVPR 2024, figure 2).

    The decoder receives the source view only through z. Therefore, the denoising loss determines what z encodes. A
    decoder with cross-attention also receives the encoder's last feature map (SODA, section 3, for novel views).
    """

    def __init__(self, encoder: Encoder, decoder: UNetDecoder) -> None:
        super().__init__(encoder)
        self.decoder = decoder

    def forward(
        self,
        x_source: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        drop_mask: Tensor,
        latent_noise: Tensor | None = None,
        rays: Tensor | None = None,
    ) -> Denoised:
        """Denoises x_t, given source views of the same image or of the same object.

        Args:
            x_source: (N, K, 3, S, S) source views, normalised; (N, K, 9, S, S) with the rays of their pixels, if the
                model has rays (model/rays.py).
            x_t: (N, 3, D, D) noised target view. D need not be S.
            timesteps: (N,) int64.
            drop_mask: (N, sections) bool. True replaces a section of the sample's latent by zeros (layer masking, SODA,
                section 3). A row of True gives the null latent. The decoder must be trained with the null latent for
                classifier-free guidance.
            latent_noise: (N, K, latent_dim) standard normal noise, with which a probabilistic encoder draws its latents
                (Kingma & Welling 2014); None: the means are used.
            rays: (N, 6, D, D) rays of the target's pixels, if the model has rays.
        """
        seen = self.encoder.feature_map(x_source.flatten(0, 1), timesteps.repeat_interleave(x_source.shape[1]))
        mean, log_variance = self.encoder.from_pooled(self.encoder.pool(seen))  # (N * K, latent_dim)
        latents = mean.unflatten(0, x_source.shape[:2])
        log_variances = None if log_variance is None else log_variance.unflatten(0, x_source.shape[:2])
        drawn = latents
        if log_variances is not None and latent_noise is not None:
            drawn = latents + (log_variances / 2).exp() * latent_noise
        z = drawn.mean(dim=1)  # (N, latent_dim)
        tokens = None
        if self.has_cross_attention:
            tokens = self.decoder.mask_tokens(_tokens(seen, x_source.shape[1]), drop_mask)
        prediction = self.decoder(x_t, timesteps, self.decoder.mask(z, drop_mask), rays, tokens)
        return Denoised(prediction, latents, log_variances)

    def encode(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns z (N, latent_dim), the mean of the latents of K source views (N, K, 3, S, S).

        Only a time-dependent encoder needs the timesteps (N,).
        """
        repeated = None if timesteps is None else timesteps.repeat_interleave(x_source.shape[1])
        latents = self.encoder(x_source.flatten(0, 1), repeated)  # (N * K, latent_dim)
        return latents.unflatten(0, x_source.shape[:2]).mean(dim=1)

    @property
    def has_cross_attention(self) -> bool:
        """True if the decoder also attends to the feature maps of the source views."""
        return self.decoder.token_dim is not None

    def tokens(self, x_source: Tensor) -> Tensor | None:
        """Returns the tokens (N, K h w, C) of `guided_denoiser`; None: the decoder has no cross-attention."""
        if not self.has_cross_attention:
            return None
        return _tokens(self.encoder.feature_map(x_source.flatten(0, 1)), x_source.shape[1])

    def condition(self, x_source: Tensor) -> Condition:
        """Returns the condition of `guided_denoiser`: z, or timesteps -> z if the encoder depends on the timestep."""
        return partial(self.encode, x_source) if self.encoder.is_time_dependent else self.encode(x_source)


def _tokens(feature_maps: Tensor, num_sources: int) -> Tensor:
    """Returns the pixels of feature maps (N * K, C, h, w) as tokens (N, K h w, C)."""
    return feature_maps.flatten(2).transpose(1, 2).unflatten(0, (-1, num_sources)).flatten(1, 2)
