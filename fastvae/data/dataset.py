"""Data sets of images: what they hand out, how a batch is made, how they are split."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

HASHED_BYTES = 2**30  # images of an array are hashed one by one up to this size


class DataError(ValueError):
    """The data cannot be used; the message names the file or the array, what is wrong and the remedy."""


class ImageDataset(Dataset[Tensor], ABC):
    """Images of one shape, as uint8 tensors [C, H, W] with values 0 to 255.

    Attributes:
        shape: (C, H, W) of every image; C is 1 (grey) or 3 (RGB).
        class_names: Names of the labels 0, 1, ..., for pictures; None if there are none.
    """

    shape: tuple[int, int, int]
    class_names: Sequence[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor: ...

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The images at `indices`, in that order: what a DataLoader calls per batch; its default collate stacks them.

        A list of views, so that stacking is the only copy; gathering first would be a second one.
        """
        return [self[index] for index in indices]

    def keys(self) -> npt.NDArray[np.uint64] | None:
        """A hash of each image, [N], that identifies its content; None if that would take too long."""
        return None


class ArrayImages(ImageDataset):
    """Images in memory, or in a memory-mapped file.

    Args:
        images: [N, C, H, W] uint8, any strides; not copied.
        labels: [N] whole numbers, kept for pictures and not handed out with the images; None if there are none.
        read_only: Whether the memory of `images` must not be written, as that of a file mapped read-only, where writing
            ends the process. Indexing then gives copies.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, *, read_only: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.read_only = read_only
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].clone() if self.read_only else self.images[index]

    def keys(self) -> npt.NDArray[np.uint64] | None:
        """A hash of each image's pixels, [N]; None beyond `HASHED_BYTES`."""
        if self.images.nbytes > HASHED_BYTES:
            return None
        hashes = (key_of(np.ascontiguousarray(image)) for image in self.images.cpu().numpy())
        return np.fromiter(hashes, np.uint64, len(self))


def key_of(content: Any) -> int:
    """64-bit hash of bytes, or of a contiguous array."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def split(dataset: Dataset[Tensor], *, validation: float = 0.1, seed: int = 0) -> tuple[Subset[Tensor], Subset[Tensor]]:
    """Split a data set at random, the same way for the same `seed`, size and `validation`, whatever torch's defaults.

    Where the data set has `groups`, [N] numbers from 0 on, a group is held out whole or not at all.

    Args:
        dataset: Any data set with a length.
        validation: Share of the images held out; rounded to whole images, at least one on each side.
        seed: Decides which images; independent of torch's default generator.

    Returns:
        (train, validation), disjoint, together all of `dataset`, each in random order.

    Raises:
        ValueError: `validation` is not between 0 and 1, or there are fewer than two images.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, both excluded; got {validation}. Pass 0.1, say.")
    n_images = len(dataset)  # type: ignore[arg-type]
    if n_images < 2:
        skipped = [f" {name} was left out: {why}." for name, why in getattr(dataset, "skipped", {}).items()]
        raise DataError(
            f"a split needs at least 2 images, one to train and one to validate; got {n_images}.{''.join(skipped[:3])} "
            "Add images."
        )
    random = torch.Generator("cpu").manual_seed(seed)
    groups: Tensor | None = getattr(dataset, "groups", None)
    if groups is not None and (n_groups := int(groups.max()) + 1) > 1:
        n_held = min(max(round(n_groups * validation), 1), n_groups - 1)
        held = torch.isin(groups.cpu(), _permutation(n_groups, random)[:n_held])
        shuffled = _permutation(n_images, random)
        kept, held_out = shuffled[~held[shuffled]].tolist(), shuffled[held[shuffled]].tolist()
        return Subset(dataset, kept), Subset(dataset, held_out)
    n_validation = min(max(round(n_images * validation), 1), n_images - 1)
    order = _permutation(n_images, random).tolist()
    return Subset(dataset, order[n_validation:]), Subset(dataset, order[:n_validation])


def _permutation(n: int, random: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=random, device="cpu")
