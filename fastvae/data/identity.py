"""The identity of a data set: what its images are, wherever they lie and whatever their files are called."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset

from .dataset import ImageDataset, key_of

SAMPLED = 256  # images that are hashed where hashing all would take too long


class Identity(NamedTuple):
    """Content of a data set.

    Attributes:
        images: Number of images.
        digest: Hash of the images in their order, hexadecimal.
        keys: [N] uint64, a hash of each image, equal for equal content; None where only a sample was hashed.
    """

    images: int
    digest: str
    keys: npt.NDArray[np.uint64] | None


def identify(dataset: Any) -> Identity:
    """The identity of a data set, by content: not by names, times or places of files.

    Of encoded images every byte is hashed, and of arrays up to 1 GiB every pixel. Of larger arrays
    and of data sets that are not of this package, 256 images at even distances, the first and the last among them, are
    hashed with their shapes and dtypes. A data set that gives another image when it is indexed again, as with random
    augmentation, is identified by its length alone.

    Args:
        dataset: Images, or tuples that start with one; a `Subset` is identified by the images that are in it.
    """
    keys = _keys(dataset)
    hashed = _sample(dataset) if keys is None else keys
    digest = hashlib.blake2b(f"{len(dataset)} images:".encode() + hashed.tobytes(), digest_size=16).hexdigest()
    return Identity(len(dataset), digest, keys)


def _keys(dataset: Any) -> npt.NDArray[np.uint64] | None:
    if type(dataset) is Subset:
        inner = _keys(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    return dataset.keys() if isinstance(dataset, ImageDataset) else None


def _sample(dataset: Any) -> npt.NDArray[np.uint64]:
    n_images = len(dataset)
    indices = sorted({round(i) for i in np.linspace(0, n_images - 1, min(n_images, SAMPLED))})
    first = [_key_of_image(dataset[index]) for index in indices]
    again = [_key_of_image(dataset[index]) for index in indices]
    return np.array(first if first == again else [], np.uint64)


def _key_of_image(sample: Any) -> int:
    image = sample[0] if isinstance(sample, tuple | list) else sample
    if not isinstance(image, Tensor):
        return 0
    pixels = image.detach().cpu().contiguous()
    return key_of(
        f"{tuple(pixels.shape)} {pixels.dtype}".encode() + pixels.flatten().view(torch.uint8).numpy().tobytes()
    )
