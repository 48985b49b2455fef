"""Batches of images that one array holds."""

import torch
from torch.utils.data import Subset

from fastvae.data import ArrayImages
from fastvae.training import batches


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
