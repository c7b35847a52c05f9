"""Images as pixels, and their similarity to their sources: PSNR and SSIM."""

from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """Clips images (N, 3, H, W) to [-1, 1] and converts them to uint8 on the host."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()


def psnr(images: Tensor, sources: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB, (N,), of images and sources (N, 3, H, W) in [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(images, sources, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, sources: Tensor) -> Tensor:
    """Returns the structural similarity (Wang et al. 2004), (N,), of images and sources (N, 3, H, W) in [-1, 1].

    The Gaussian window has the usual standard deviation of 1.5 pixels. It is smaller for images below 13 px, so that
    the window fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(images, sources, sigma=_sigma(images), data_range=2.0, reduction="none")
    assert isinstance(found, Tensor), "no contrast map was requested"
    return found


def ssim_maps(images: Tensor, sources: Tensor) -> Tensor:
    """Returns the structural similarity of each pixel, (N, 3, H, W), whose mean is that of `ssim`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = _sigma(images)
    found = structural_similarity_index_measure(
        images, sources, sigma=sigma, data_range=2.0, reduction="none", return_full_image=True
    )
    assert isinstance(found, tuple), "the map was requested"
    return found[1]


def _sigma(images: Tensor) -> float:
    return min(1.5, (images.shape[-1] - 1) // 2 / 3.5)  # torchmetrics' window reaches 3.5 standard deviations


def captions(images: Tensor, sources: Tensor) -> list[str]:
    """Returns a caption for each image: its PSNR in dB and its SSIM, after clipping to [-1, 1] as in the picture."""
    shown = images.clamp(-1, 1)
    values = zip(psnr(shown, sources).tolist(), ssim(shown, sources).tolist(), strict=True)
    return [f"PSNR {decibels:.1f}\nSSIM {similarity:z.2f}" for decibels, similarity in values]
