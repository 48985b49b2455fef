"""Encoded images, in files or in memory: the one reader for every source of them."""

import io
import struct
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .dataset import DataError, ImageDataset, key_of

if TYPE_CHECKING:
    from PIL.Image import Image

GREY_MODES = frozenset({"1", "L", "LA"})
DEEP_MODES = ("I", "F")  # 16 or 32 bits per value; Pillow would clip them at 255
SIDEWAYS = range(5, 9)  # EXIF orientations that swap height and width
PNG_TAGS = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # chunks that may hold an EXIF orientation


class Header(NamedTuple):
    """What the first bytes of an image tell; (height, width) is that of the upright image."""

    size: tuple[int, int]
    grey: bool


class EncodedImages(ImageDataset):
    """Images that are decoded when they are indexed.

    A subclass implements `__len__` and `_encoded`, and calls `_check_all` at the end of its `__init__`.

    Attributes:
        skipped: Why each image or file was left out, by its name.
    """

    skipped: dict[str, str]

    @abstractmethod
    def _encoded(self, index: int) -> tuple[str, Path | bytes | None]:
        """The name of an image in messages, and its file or its content; None if it has none."""

    def _check_all(self, origin: str, image_size: tuple[int, int] | None, *, strict: bool) -> list[int]:
        """Check every image, set `shape`, and return the indices of those that can be read.

        Images are grey, with one channel, if all of them are; otherwise all are RGB.

        Args:
            origin: Name of the data set in messages.
            image_size: (height, width) to crop and resize to; None if sizes must agree.
            strict: Whether to raise for an image that cannot be read after checking the headers alone. If False,
                every image is decoded, and those that fail are added to `skipped`.

        Raises:
            DataError: no image can be read, sizes differ without `image_size`, or, if `strict`, the first fault.
        """
        self._resizes = image_size is not None
        with ThreadPoolExecutor() as pool:  # decoders release the GIL
            found = list(pool.map(lambda index: self._check(index, strict), range(len(self))))
        kept = [index for index, (_, header) in enumerate(found) if isinstance(header, Header)]
        self.skipped |= {name: str(error) for name, error in found if isinstance(error, DataError)}
        if not kept:
            raise DataError(f"none of the {len(found)} images in {origin} can be read; {found[0][1]}")
        headers = [(name, header) for name, header in found if isinstance(header, Header)]
        first_name, first = headers[0]
        for name, header in headers:
            if image_size is None and header.size != first.size:
                raise DataError(
                    f"images of one size are needed; {first_name} is {_words(first.size)}, {name} is "
                    f"{_words(header.size)}. Pass --image-size H W (image_size=(H, W) in Python) to resize."
                )
        grey = all(header.grey for _, header in headers)
        self.shape = (1 if grey else 3, *(image_size or first.size))
        return kept

    def _check(self, index: int, strict: bool) -> tuple[str, Header | DataError]:
        name, source = self._encoded(index)
        try:
            with opened(source, name) as image:
                header = _header(image, name)
                if not strict:
                    image.load()
            return name, header
        except DataError as error:
            if strict:
                raise
            return name, error

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        name, source = self._encoded(index)
        with opened(source, name) as image:
            pixels = decoded(image, channels, name)
            if pixels.size != (width, height):
                if not self._resizes:
                    raise DataError(
                        f"{name} is now {_words((pixels.height, pixels.width))} and was {_words((height, width))} when "
                        "the data was loaded. Leave the images alone while they are read."
                    )
                pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(pixels).reshape(height, width, channels)).permute(2, 0, 1).contiguous()

    def keys(self) -> npt.NDArray[np.uint64]:
        """A hash of each image's encoded bytes, [N]; reads all of them."""
        with ThreadPoolExecutor() as pool:
            return np.fromiter(pool.map(self._key, range(len(self))), np.uint64, len(self))

    def _key(self, index: int) -> int:
        name, source = self._encoded(index)
        try:
            return key_of(source.read_bytes() if isinstance(source, Path) else source or b"")
        except OSError as error:
            raise _unreadable(name, error) from error


@contextmanager
def opened(source: Path | bytes | None, name: str) -> Iterator["Image"]:
    """The opened image. An error inside the block becomes a `DataError` that names the image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "fastvae-triton[train]"') from error
    if source is None:
        raise DataError(f"{name} is missing: its row holds no image. Remove the row.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image that Pillow can read. Remove or replace it.") from error
    except Exception as error:  # decoders raise almost anything for damaged bytes: struct.error, KeyError, ...
        if isinstance(error, OSError) and error.strerror:
            raise _unreadable(name, error) from error
        raise DataError(f"{name} is damaged or too large to decode ({error}). Remove or replace it.") from error


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name} cannot be read: {error.strerror}. Set its permissions or remove it.")


def decoded(image: "Image", channels: int, name: str) -> "Image":
    """The image upright, without transparency, with 1 (grey) or 3 (RGB) channels of 8 bits.

    Raises:
        DataError: the image has more than 8 bits per value.
    """
    from PIL import ImageOps

    _require_8_bits(image, name)
    ImageOps.exif_transpose(image, in_place=True)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it has to drop a palette's transparency itself
    return image.convert("L" if channels == 1 else "RGB")


def _header(image: "Image", name: str) -> Header:
    _require_8_bits(image, name)
    width, height = image.size
    return Header((width, height) if _lies_sideways(image) else (height, width), image.mode in GREY_MODES)


def _require_8_bits(image: "Image", name: str) -> None:
    if image.mode.startswith(DEEP_MODES):
        raise DataError(f"{name} has more than 8 bits per value (Pillow mode {image.mode}). Convert it to 8 bits.")


def _lies_sideways(image: "Image") -> bool:
    """Whether turning the image upright swaps its height and width."""
    from PIL import ExifTags

    # Pillow gives a TIFF's size upright already, and decodes a whole PNG to look for tags after its pixels
    if image.format == "TIFF" or (image.format == "PNG" and not _png_has_tags(image.fp)):  # type: ignore[attr-defined]
        return False
    return image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS


def _png_has_tags(file: BinaryIO) -> bool:
    position = file.tell()
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in PNG_TAGS:
                return True
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(position)


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} (height x width)"
