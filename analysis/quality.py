"""Similarity of images to their sources: PSNR and SSIM."""

from torch import Tensor


def psnr(images: Tensor, sources: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of images (N, 3, H, W), both in [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(images, sources, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, sources: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,), of images (N, 3, H, W), both in [-1, 1].

    The Gaussian window has the usual standard deviation of 1.5 pixels; less for images below 13 px, so that it fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = min(1.5, (images.shape[-1] - 1) // 2 / 3.5)  # torchmetrics' window reaches 3.5 deviations
    found = structural_similarity_index_measure(images, sources, sigma=sigma, data_range=2.0, reduction="none")
    assert isinstance(found, Tensor), "no contrast map was asked for"
    return found


def captions(images: Tensor, sources: Tensor) -> list[str]:
    """A caption for each image, with its PSNR in dB and SSIM after clipping to [-1, 1], as it is shown."""
    shown = images.clamp(-1, 1)
    values = zip(psnr(shown, sources).tolist(), ssim(shown, sources).tolist(), strict=True)
    return [f"PSNR {decibels:.1f}\nSSIM {similarity:z.2f}" for decibels, similarity in values]
