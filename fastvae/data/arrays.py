"""Images from NumPy arrays: .npy and .npz files, and whatever array another source has read."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import ArrayImages, DataError

CHUNK_BYTES = 2**24  # of input converted or resized at a time


def load_array_file(path: Path, image_size: tuple[int, int] | None) -> ArrayImages:
    """Open a .npy file (memory-mapped) or a .npz file (key `images`, or its only array) without pickle."""
    try:
        array, labels = _read_npz(path) if path.suffix.lower() == ".npz" else (_map_npy(path), None)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror or error}. Set its permissions or replace it."
        ) from error
    except Exception as error:  # NumPy raises almost anything for damaged bytes: TokenError, NotImplementedError, ...
        raise DataError(
            f"{path} cannot be read as a NumPy file ({error}). It must be a whole .npy or .npz file of plain numbers "
            "(no Python objects), as np.save and np.savez write."
        ) from error
    dataset = images_from_array(array, str(path), image_size)
    dataset.labels = _checked_labels(labels, len(dataset), path) if labels is not None else None
    return dataset


def images_from_array(array: npt.NDArray[Any], name: str, image_size: tuple[int, int] | None = None) -> ArrayImages:
    """Check an array of images and bring it to uint8 [N, C, H, W].

    Args:
        array: [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3; uint8, or floats in [0, 1], which are rounded to
            n / 255. uint8 arrays are not copied.
        name: What messages call it.
        image_size: (H, W) to crop and resize to, antialiased bicubic; None leaves the size.

    Raises:
        DataError: another shape or dtype, no images, NaN, values outside [0, 1].
    """
    array = _channels_first(array, name)
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{name}: images must be uint8 (0 to 255) or floats in [0, 1]; got {array.dtype}. Convert with "
            f"{'array.astype(np.uint8) * 255' if array.dtype == bool else 'array.astype(np.uint8) if its values fit'}."
        )
    if array.dtype != np.uint8:
        array = _quantize(array, name)
    with warnings.catch_warnings(action="ignore"):  # PyTorch warns of memory that must not be written
        images = torch.from_numpy(array)
    if image_size is not None and image_size != tuple(images.shape[2:]):
        return ArrayImages(_resize(images, image_size))
    return ArrayImages(images, read_only=not array.flags.writeable)


def _map_npy(path: Path) -> npt.NDArray[Any]:
    # read-only: a writable mapping, even a private one, is refused where it is larger than memory
    array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    return array


def _read_npz(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """The images, and the labels if there are any."""
    with path.open("rb") as file, np.lib.npyio.NpzFile(file) as archive:
        names = archive.files
        if "images" not in names and len(names) != 1:
            raise DataError(
                f"{path} must hold an array named images, or one array alone; it holds {', '.join(names) or 'none'}. "
                "Save it with np.savez(file, images=array)."
            )
        if "images" not in names:
            return archive[names[0]], None
        return archive["images"], archive["labels"] if "labels" in names else None


def _checked_labels(labels: npt.NDArray[Any], n_images: int, path: Path) -> Tensor:
    if labels.shape != (n_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: labels must be one whole number for each of the {n_images} images; got {labels.dtype} of shape "
            f"{labels.shape}. Leave the labels out or number the classes."
        )
    return torch.from_numpy(labels.astype(np.int64))


def _channels_first(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{name}: shape {array.shape} can be read as [N, C, H, W] and as [N, H, W, C]. "
                "Pass grey images as [N, H, W]; pad colour images to more than 3 pixels."
            )
        if last:
            array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise DataError(
            f"{name}: images must be [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3; got shape {array.shape}. "
            "Reshape it; of RGBA keep array[..., :3]."
        )
    if array.size == 0:
        raise DataError(f"{name} holds no images: its shape is {array.shape}. Pass at least one image of one pixel.")
    return array


def _quantize(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    images = np.empty(array.shape, np.uint8)
    for chunk in _chunks(array.shape, array.itemsize):
        with np.errstate(over="ignore"):  # infinite values are refused
            values = array[chunk].astype(np.float32)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            inside = ((values >= 0) & (values <= 1)).all(axis=(1, 2, 3))
            worst = int(np.argmin(inside))
            raise DataError(
                f"{name}: floats must lie in [0, 1]; image {chunk.start + worst} spans {values[worst].min()} to "
                f"{values[worst].max()}. Rescale the array; replace NaN."
            )
        images[chunk] = np.rint(values * 255)
    return images


def _resize(images: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The largest part of image_size's aspect ratio at the centre of each image, resized."""
    height, width = images.shape[2:]
    scale = min(height / image_size[0], width / image_size[1])
    part_height, part_width = (max(1, round(scale * side)) for side in image_size)
    top, left = (height - part_height) // 2, (width - part_width) // 2
    images = images[:, :, top : top + part_height, left : left + part_width]
    resized = torch.empty((*images.shape[:2], *image_size), dtype=torch.uint8, device="cpu")
    for chunk in _chunks(tuple(images.shape), images.itemsize):
        # in floats: on bytes PyTorch rounds between the two directions and ends up to 8 levels from Pillow
        values = F.interpolate(images[chunk].float(), image_size, mode="bicubic", antialias=True, align_corners=False)
        resized[chunk] = values.round_().clamp_(0, 255)
    return resized


def _chunks(shape: tuple[int, ...], itemsize: int) -> list[slice]:
    step = max(CHUNK_BYTES // (itemsize * int(np.prod(shape[1:]))), 1)
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
