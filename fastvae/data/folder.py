"""A folder of image files, decoded as they are asked for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

    Folders of classes are sub-folders as any others; `labels` numbers them.

    Args:
        root: The folder.
        image_size: (H, W) to resize to, antialiased bicubic, aspect ratio not kept; None: sizes must agree.
        strict: Whether a damaged file is an error: headers are checked here, and a file damaged further in is named
            when it is decoded. If not, every file is decoded once here, and those that cannot be are left out.

    Attributes:
        labels: [N] number of the sub-folder, in the order of names; None where there are none.
        skipped: What is wrong with each file that was left out, by its path.

    Raises:
        DataError: no images, mixed sizes without `image_size` or, if `strict`, a file that is not an image or deeper
            than 8 bits.
    """

    labels: Tensor | None

    def __init__(self, root: Path, image_size: tuple[int, int] | None = None, *, strict: bool = True) -> None:
        self._resized = image_size is not None
        self.skipped: dict[str, str] = {}
        paths = _image_paths(root)
        with ThreadPoolExecutor() as pool:  # decoders release Python's lock
            found = list(pool.map(_inspect if strict else _decodes, paths))
        self.skipped = {str(path): str(e) for path, e in zip(paths, found, strict=True) if isinstance(e, DataError)}
        if len(self.skipped) == len(paths):
            raise DataError(f"none of the {len(paths)} images in {root} can be read; {found[0]}")
        self.paths = [path for path in paths if str(path) not in self.skipped]
        sizes, grey = zip(*(f for f in found if not isinstance(f, DataError)), strict=True)
        classes = sorted({path.parent for path in self.paths})
        self.labels = torch.tensor([classes.index(p.parent) for p in self.paths]) if len(classes) > 1 else None
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
        with _opened(self.paths[index]) as image:
            return pixels_of(image, self.shape)


def pixels_of(image: "Image", shape: tuple[int, int, int]) -> Tensor:
    """The image as uint8 [C, H, W] of this shape, upright, without transparency; resized if its size is another."""
    from PIL import Image

    channels, height, width = shape
    pixels = _converted(image, channels)
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels).reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def decoded(path: Path, channels: int) -> "Image":
    """The image of a file, in memory, as `pixels_of` sees it.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as image:
        return _converted(image, channels)


def _converted(image: "Image", channels: int) -> "Image":
    if "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when it has to drop a palette's transparency itself
    return _upright(image).convert("L" if channels == 1 else "RGB")


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


def _decodes(path: Path) -> tuple[tuple[int, int], bool] | DataError:
    """`_inspect`, and whether all of the file can be decoded; what is wrong with it if not."""
    try:
        with _opened(path) as image:
            image.load()
        return _inspect(path)
    except DataError as error:
        return error


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
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Set its permissions or remove it.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that Pillow can read. Remove or replace it.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or too large to decode ({error}). Remove or replace it.") from error


def _describe(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"
