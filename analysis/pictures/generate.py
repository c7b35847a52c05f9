"""New images from a prior over the latents: a Gaussian mixture, or a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import Picture, number, option
from config.errors import ConfigError
from utils.distributed.collectives import on_rank_0

if TYPE_CHECKING:
    import numpy as np

    from analysis.grid import Grid
    from evaluation.codec import Codec
    from experiment.opening import Experiment


@dataclass(frozen=True, kw_only=True)
class Generate(Picture[None]):
    """New images: z is drawn from a prior that has been fitted to the training latents, x_T is random."""

    name = "generate"
    meaning = "new images: z from a Gaussian mixture, or a diffusion model (see fit_prior), of the training latents"

    prior: str = option(
        "mixture",
        "distribution that z is drawn from: a Gaussian mixture, or the diffusion model of fit_prior; default: mixture",
        choices=("mixture", "diffusion"),
    )
    num_components: int = number(10, "number of Gaussians in the mixture; with --prior diffusion, number of rows")
    num_samples: int = number(8, "number of samples from each Gaussian, or per row")

    @property
    def needs_prior(self) -> bool:
        return self.prior == "diffusion"

    def find(self, experiment: Experiment) -> None:
        from analysis.latent_space import MAX_FIT

        if self.prior == "diffusion":
            return

        most = min(len(experiment.train), MAX_FIT)
        if self.num_components > most:
            raise ConfigError(
                f"--num_components {self.num_components} is too large: use at most {most} (latents in the fit)"
            )

    def draw(self, codec: Codec, found: None) -> Grid:
        from analysis.grid import Grid, to_cells

        if self.prior == "mixture":
            return self._draw_from_mixture(codec)
        assert codec.draw_latents is not None, "the picture needs a diffusion prior"
        z = codec.draw_latents(self.num_components * self.num_samples, codec.seed)
        sampled = codec.sample(z, codec.noise(len(z), "generated")).split(self.num_samples)
        return Grid(
            title="New images",
            explanation="z is drawn from a diffusion model fitted to the training latents; x_T is random noise.",
            columns=[""] * self.num_samples,
            rows=[],
            cells=[to_cells(images) for images in sampled],
        )

    def _draw_from_mixture(self, codec: Codec) -> Grid:
        import numpy as np
        import torch

        from analysis.grid import Grid, to_cells
        from analysis.latent_space import sample_mixture, subset_to_fit
        from utils.randomness import derive_seed

        train, seed = codec.experiment.train, codec.experiment.config.seed
        latents, labels = subset_to_fit(codec.train_z, train.labels, seed)

        def fit() -> tuple[np.ndarray, list[str]]:
            random_state = derive_seed(codec.seed, "mixture") % 2**32
            points, weights, component = sample_mixture(latents, self.num_components, self.num_samples, random_state)
            names = [f"component {i + 1}: {100 * weight:.0f} %" for i, weight in enumerate(weights)]
            if labels is not None:
                for i in range(len(names)):
                    counts = np.bincount(labels.numpy()[component == i], minlength=len(train.classes))
                    share = 100 * counts.max() / max(1, counts.sum())
                    names[i] += f"\n{share:.0f} % {train.classes[int(counts.argmax())]}"
            return np.concatenate(points), names

        drawn, names = on_rank_0(fit)
        z = torch.tensor(drawn, dtype=torch.float32, device=codec.train_z.device)
        sampled = codec.sample(z, codec.noise(len(z), "generated")).split(self.num_samples)
        return Grid(
            title="New images",
            explanation=f"z is drawn from a mixture of {self.num_components} Gaussians fitted to the training latents; "
            "x_T is random noise. Each row shows one component. Its label gives the weight of the component"
            + (" and the percentage of its latents in the most frequent class." if labels is not None else "."),
            columns=[""] * self.num_samples,
            rows=names,
            cells=[to_cells(images) for images in sampled],
        )
