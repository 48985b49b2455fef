"""Colour crops of the photographs that scikit-image and scikit-learn carry: real photographs without a download."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .dataset import ImageDataset, key_of
from .images import decoded, opened

# of a stereo pair, one; no drawings, no texts, no stained tissue
PHOTOS = {
    "skimage": (
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/hubble_deep_field.jpg"),
        *("data/motorcycle_left.png", "data/retina.jpg", "data/rocket.jpg"),
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
CROPS = 512  # of each photograph
SIZE = (64, 64)
_AREA, _RATIO = (0.02, 0.5), (3 / 4, 4 / 3)  # share of the photograph; width to height


class PhotoCrops(ImageDataset):
    """Random-resized crops of nine photographs, as many of each, the same every time.

    A crop has 2 to 50 % of its photograph and a ratio of 3:4 to 4:3, drawn log-uniformly; half of them are mirrored.
    `split` holds out whole photographs.

    Args:
        image_size: (height, width) of the crops.
        crops: Of each photograph.

    Attributes:
        groups: [N] which photograph each crop is of.

    Raises:
        ImportError: scikit-image or scikit-learn is not installed.
    """

    def __init__(self, image_size: tuple[int, int] | None = None, crops: int = CROPS) -> None:
        self.paths = [_package(package) / name for package, names in PHOTOS.items() for name in names]
        self.shape = (3, *(image_size or SIZE))
        self.groups = torch.arange(len(self.paths), device="cpu").repeat_interleave(crops)
        self._photos = []
        for path in self.paths:
            with opened(path, str(path)) as image:
                self._photos.append(decoded(image, 3, str(path)))

    def __len__(self) -> int:
        return len(self.groups)

    def keys(self) -> npt.NDArray[np.uint64]:
        """A hash of the photograph, the number and the size of each crop, [N]."""
        photos = [key_of(path.read_bytes()) for path in self.paths]
        crops = enumerate(self.groups.tolist())
        return np.array([key_of(f"{photos[group]} {index} {self.shape}".encode()) for index, group in crops], np.uint64)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        photo = self._photos[int(self.groups[index])]
        random = np.random.default_rng(index)
        share, ratio = np.exp(random.uniform(*np.log([_AREA, _RATIO]).T)).tolist()
        area = photo.width * photo.height * share
        width, height = min(math.sqrt(area * ratio), photo.width), min(math.sqrt(area / ratio), photo.height)
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        size = (self.shape[2], self.shape[1])
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return (pixels.flip(2) if random.random() < 0.5 else pixels).contiguous()


def _package(name: str) -> Path:
    """The folder of an installed package, which need not be imported for its files."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the photographs come with {name}: pip install "fastvae-triton[train,photos]"')
    return Path(next(iter(spec.submodule_search_locations)))
