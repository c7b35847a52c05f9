"""Similarity of reconstructions to their images: PSNR, SSIM, mean squared error and LPIPS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measure, Measured, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment


class Reconstruction(Measure):
    """PSNR, SSIM (Wang et al. 2004) and mean squared error of images that are decoded from z, to their sources.

    PSNR = 10 log10(1 / MSE), for images in [0, 1]. SSIM is the mean over the image of
    (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2)), with means m, variances s^2 and
    covariance s_xy in a Gaussian window. Each is computed per image and averaged over the images, after clipping.

    "z and its x_T" decodes z from the noise that DDIM inversion finds (Preechakul et al. 2022). "z and random x_T" is
    one sample, with the settings of `sampling`. "mean image" is the mean of training images, which a decoder without
    any latent could produce.
    """

    name = "reconstruction"
    meaning = "PSNR, SSIM and squared error of images decoded from z, with inverted and with random x_T"
    cost = (
        "inverts, decodes and samples at most 200 images: 4 passes of the decoder per image and sampling step, 5 with "
        "guidance"
    )
    needs = ("torchmetrics",)

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.quality import psnr, ssim

        sources, found = subjects.reconstructed
        rows: Rows = {"PSNR (dB)": {}, "SSIM": {}, "squared error x 1000": {}}
        for name, images in found.items():
            errors = ((images - sources) / 2).square().flatten(1).mean(dim=1)
            values = psnr(images, sources), ssim(images, sources), 1000 * errors
            for row, value in zip(rows, values, strict=True):
                rows[row][name] = {"value": value.mean().item()}
        return Measured(f"similarity to {describe(subjects)}; squared error for values in [0, 1]", rows, decimals=2)


class LPIPS(Measure):
    """LPIPS (Zhang et al., CVPR 2018) of the reconstructions of the measure `reconstruction`, to their sources.

    sum_l mean_(h, w) w_l . (f_l(x) - f_l(y))^2, with f_l the features of layer l of AlexNet, scaled to length 1 at each
    pixel, and learned weights w_l. It is 0 for equal images. Images below 64 px are enlarged to 64 px, because AlexNet
    reduces smaller ones to nothing.
    """

    name = "lpips"
    meaning = "perceptual distance (LPIPS) of the same reconstructions, by AlexNet weights of --lpips"
    cost = "as reconstruction, whose images it shares, and one pass of AlexNet"
    needs = ("torchmetrics",)

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return (
            None
            if inputs.lpips
            else "it needs torchvision's AlexNet weights, which are not downloaded: add --lpips FILE"
        )

    def measure(self, subjects: Subjects) -> Measured:
        lpips = subjects.inputs.lpips
        assert lpips is not None, "the measure needs AlexNet"
        sources, found = subjects.reconstructed
        values: dict[str, Tensor] = {name: lpips(images, sources) for name, images in found.items()}
        rows: Rows = {"LPIPS": {name: {"value": value.mean().item()} for name, value in values.items()}}
        return Measured(f"LPIPS (AlexNet) to {describe(subjects)}", rows, decimals=3)


def describe(subjects: Subjects) -> str:
    """Returns the images that are reconstructed, and the settings of the sampler, for a protocol."""
    sources, _ = subjects.reconstructed
    split = "training" if subjects.experiment.test is None else "test"
    return f"{len(sources)} {split} images of {sources.shape[-1]} px; {subjects.sampling}"
