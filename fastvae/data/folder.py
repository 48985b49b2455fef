"""A folder of image files, decoded as they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .dataset import DataError, ImageDataset

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})
GREY_MODES = frozenset({"1", "L", "LA"})
DEEP_MODES = ("I", "F")  # 16 or 32 bits a value; PIL would cut them off at 255
SIDEWAYS = range(5, 9)  # EXIF orientations that swap height and width


class FolderImages(ImageDataset):
    """The images below a folder, sub-folders included, in the order of their names.

    Files without an image's suffix and hidden ones are left out. Images stay grey, one channel, if every file is; else
    all are RGB. Transparency is dropped; of an animation the first frame is taken; a photograph is turned upright as
    its EXIF orientation says.

    Args:
        root: The folder.
        image_size: (H, W) to resize to, antialiased bicubic, aspect ratio not kept; None: sizes must agree.

    Raises:
        DataError: no images, a file that is not an image or deeper than 8 bits, or mixed sizes without `image_size`.
            Headers are checked here; a file damaged further in is named when it is decoded.
    """

    def __init__(self, root: Path, image_size: tuple[int, int] | None = None) -> None:
        self.paths = _image_paths(root)
        self._resized = image_size is not None
        sizes, grey = zip(*map(_inspect, self.paths), strict=True)
        for path, size in zip(self.paths, sizes, strict=True):
            if image_size is None and size != sizes[0]:
                raise DataError(
                    f"images of one size are needed; {self.paths[0]} is {_describe(sizes[0])}, {path} is "
                    f"{_describe(size)}. Pass --image-size H W (image_size=(H, W) in Python) to resize."
                )
        self.shape = (1 if all(grey) else 3, *(image_size or sizes[0]))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        channels, height, width = self.shape
        with _opened(self.paths[index]) as image:
            if "transparency" in image.info:
                image = image.convert("RGBA")  # PIL warns when it has to drop a palette's transparency itself
            pixels = _upright(image).convert("L" if channels == 1 else "RGB")
            if self._resized:
                pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
        array = np.array(pixels).reshape(height, width, channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _image_paths(root: Path) -> list[Path]:
    visible = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    paths = sorted(path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        others = sum(path.is_file() for path in visible)
        raise DataError(
            f"no images in {root}: looked there and in its sub-folders for {', '.join(sorted(SUFFIXES))}"
            f" and found {others or 'no'} other files. Pass a folder of images."
        )
    return paths


def _inspect(path: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) and whether it is grey, from the header alone."""
    with _opened(path) as image:
        if image.mode.startswith(DEEP_MODES):
            raise DataError(f"{path} has more than 8 bits a value (PIL mode {image.mode}). Convert it to 8 bits.")
        width, height = image.size
        sideways = _orientation(image) in SIDEWAYS
        return (width, height) if sideways else (height, width), image.mode in GREY_MODES


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _orientation(image: "Image") -> int:
    from PIL import ExifTags

    # cameras write JPEG; asking a PNG would decode all of it
    return int(image.getexif().get(ExifTags.Base.Orientation, 1)) if image.format in ("JPEG", "MPO") else 1


@contextmanager
def _opened(path: Path) -> Iterator["Image"]:
    """The opened image; whatever goes wrong inside names its file."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('a folder of images needs Pillow: pip install "fastvae-triton[train]"') from error
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that Pillow can read. Remove or replace it.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or too large to decode ({error}). Remove or replace it.") from error


def _describe(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"
