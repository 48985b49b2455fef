"""IDX files, the format in which MNIST and its successors are published: plain or gzip-compressed."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .._files import require_regular
from .dataset import DataError

UINT8 = 0x08


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes: two zero bytes, type, rank, rank big-endian uint32 sizes, the values.

    Returns:
        uint8 array of the file's shape, writable.

    Raises:
        DataError: not an IDX file of bytes, damaged compression, or more or fewer values than the sizes promise.

    Source: http://yann.lecun.com/exdb/mnist, "File formats".
    """
    content = _read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UINT8 or content[3] == 0:
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes: it must begin with 00 00 08 and its rank; got "
            f"{content[:4].hex(' ') or 'an empty file'}. Pass the files as they were published."
        )
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise DataError(f"{path} ends inside its IDX header, after {len(content)} of {header} bytes. Fetch it again.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    n_values = len(content) - header
    if n_values != math.prod(shape):
        raise DataError(
            f"{path} promises {' x '.join(map(str, shape))} = {math.prod(shape)} values and holds {n_values}. "
            "Fetch it again."
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=header).reshape(shape)


def read_idx_images(source: Path) -> npt.NDArray[np.uint8]:
    """Read the images of one IDX file, or of every file of a directory with `idx3` in its name, in sorted order.

    Returns:
        [N, H, W] uint8. Where a directory holds a file both plain and compressed, the plain one is read.

    Raises:
        DataError: no such file, none that holds images, sizes that differ, or a damaged file.
    """
    if not source.exists():
        raise DataError(f"idx:{source}: no such file or directory. Pass idx: and the folder with the IDX files.")
    paths = _image_files(source) if source.is_dir() else [source]
    arrays: list[npt.NDArray[np.uint8]] = []
    for path in paths:
        array = read_idx(path)
        if array.ndim != 3:
            raise DataError(f"{path} must hold images, [N, H, W]; its shape is {array.shape}. Are these the labels?")
        if array.shape[1:] != (arrays[0] if arrays else array).shape[1:]:
            raise DataError(
                f"images of one size are needed; {paths[0]} has {arrays[0].shape[1:]}, {path} has {array.shape[1:]}. "
                "Name one of them: idx:FILE."
            )
        arrays.append(array)
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _image_files(directory: Path) -> list[Path]:
    named = [p for p in directory.iterdir() if p.is_file() and "idx3" in p.name and not p.name.startswith(".")]
    plain = {path.name for path in named if path.suffix != ".gz"}
    paths = sorted(path for path in named if path.name.removesuffix(".gz") not in plain or path.name in plain)
    if not paths:
        raise DataError(
            f"idx:{directory}: no file with idx3 in its name (as in train-images-idx3-ubyte.gz). "
            "Pass the folder that holds one, or the file itself: idx:FILE."
        )
    return paths


def _read_bytes(path: Path) -> bytes:
    require_regular(path)
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}). Fetch it again.") from error
