"""Tests of random numbers and of the order of the images."""

import torch

from datasets.loader import Loader
from utils.randomness import derive_seed, generator, image_noise, uniforms

CPU = torch.device("cpu")


def test_seeds_differ_by_everything_that_they_are_derived_from() -> None:
    seeds = [derive_seed(s, p, *c) for s in (0, 1) for p in ("a", "b") for c in ((), (0,), (1,), (0, 1), (1, 0), (10,))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "a", 3) == derive_seed(0, "a", 3)


def test_a_share_of_the_noise_is_that_part_of_the_whole() -> None:
    whole = image_noise((3, 4, 4), range(24), 0, "noise", 5, device=CPU)
    torch.testing.assert_close(whole.mean(), torch.zeros(()), atol=0.15, rtol=0)
    torch.testing.assert_close(whole.std(), torch.ones(()), atol=0.1, rtol=0)
    assert len(torch.unique(whole)) == whole.numel()
    for share in (range(0, 8), range(8, 24), range(20, 24), range(5, 6), range(3, 18)):
        part = image_noise((3, 4, 4), share, 0, "noise", 5, device=CPU)
        assert torch.equal(part, whole[share.start : share.stop])
    assert not torch.equal(image_noise((3, 4, 4), range(24), 0, "noise", 6, device=CPU), whole)


def test_uniform_numbers_belong_to_positions() -> None:
    whole = uniforms(range(0, 700), 5, 0, "view", 3)
    assert whole.shape == (700, 5) and len(whole.unique()) > 3400 and abs(whole.mean() - 0.5) < 0.03
    for part in (range(8, 12), range(250, 600), range(512, 513)):
        assert torch.equal(uniforms(part, 5, 0, "view", 3), whole[part.start : part.stop])
    assert not torch.equal(uniforms(range(0, 700), 5, 0, "view", 4), whole)


def loader() -> Loader:
    """Returns a loader of 50 images in batches of 16."""
    return Loader(50, 16, lambda epoch: generator(0, "order", epoch))


def test_an_epoch_is_a_permutation_without_its_rest() -> None:
    """An epoch is a random order of the images, without the last, incomplete batch."""
    ours = loader()
    assert ours.steps_per_epoch == 3
    epochs = [torch.cat([ours.indices(3 * epoch + step, range(16)) for step in range(3)]) for epoch in range(2)]
    for order in epochs:
        assert len(order.unique()) == 48 and order.min() >= 0 and order.max() < 50
    assert not torch.equal(*epochs)


def test_the_loader_is_addressed_by_step_and_position() -> None:
    forward, anywhere = loader(), loader()
    batches = [forward.indices(step, range(16)) for step in range(7)]
    for step in (6, 0, 3, 5):
        assert torch.equal(anywhere.indices(step, range(4, 12)), batches[step][4:12])
