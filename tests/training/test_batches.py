"""Batches of images that one array holds."""

import torch
from torch.utils.data import Subset

from fastvae.data import ArrayImages, batches


def test_images_in_memory_come_as_loaded_ones_do():
    class Others(ArrayImages):  # whose __getitem__ may do anything
        pass

    images = torch.randint(256, (9, 3, 5, 4), dtype=torch.uint8).transpose(2, 3)
    order = [[4, 0, 1], [2, 3]]
    found, loaded = (
        list(batches.load_batches(Subset(Subset(kind(images), [8, 3, 5, 0, 7, 1]), [5, 2, 4, 0, 1]), order))
        for kind in (ArrayImages, Others)
    )
    assert len(found) == len(loaded) == 2
    for ours, theirs in zip(found, loaded, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found[0][1], images[1])


def test_half_of_the_images_are_mirrored_whichever_process_has_them():
    images = torch.arange(1000 * 6).reshape(1000, 1, 2, 3)
    whole = batches.mirrored(images, seed=3, step=5, first=0)
    flips = (whole == images.flip(3)).all(dim=(1, 2, 3))
    assert torch.equal(whole[~flips], images[~flips])
    assert 430 < int(flips.sum()) < 570
    assert torch.equal(batches.mirrored(images[600:], seed=3, step=5, first=600), whole[600:])
    for other in ({"seed": 3, "step": 6}, {"seed": 4, "step": 5}):
        assert not torch.equal(batches.mirrored(images, **other, first=0), whole)
