"""How near an image comes to another."""

from torch import Tensor


def psnr(images: Tensor, sources: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of images (N, 3, H, W), both in [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(images, sources, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(images: Tensor, sources: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,), of images (N, 3, H, W), both in [-1, 1].

    The Gaussian window has the usual deviation of 1.5 pixels, or less where images are too small for it (below 13 px).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = min(1.5, (images.shape[-1] - 1) // 2 / 3.5)  # torchmetrics' window reaches 3.5 deviations
    found = structural_similarity_index_measure(images, sources, sigma=sigma, data_range=2.0, reduction="none")
    assert isinstance(found, Tensor), "nothing else was asked for"
    return found


def captions(images: Tensor, sources: Tensor) -> list[str]:
    """Both, of images as they are seen: clipped. PSNR is in dB."""
    seen = images.clamp(-1, 1)
    values = zip(psnr(seen, sources).tolist(), ssim(seen, sources).tolist(), strict=True)
    return [f"PSNR {noise:.1f}\nSSIM {similarity:z.2f}" for noise, similarity in values]
