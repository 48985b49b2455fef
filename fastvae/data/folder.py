"""A folder of image files, decoded as they are asked for."""

import os
from pathlib import Path

import torch
from torch import Tensor

from .._files import is_run_folder
from .dataset import DataError
from .images import EncodedImages

# formats that Pillow identifies and cannot decode by itself, and those that are not pixels
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})


class FolderImages(EncodedImages):
    """The images below a folder, sub-folders included, in the order of their names.

    A file is an image if its suffix is that of a raster format that Pillow reads. Symbolic links to folders are
    followed, and each folder is read once. Hidden files and folders are ignored, and run folders of `fastvae train`
    are left out. Images stay grey, one channel, if every file is; else all are RGB. Transparency is dropped; of an
    animation the first frame is taken; a photograph is turned upright as its EXIF orientation says.

    Folders of classes are sub-folders as any others; `labels` numbers them, and `class_names` has their names.

    Args:
        root: The folder.
        image_size: (H, W) to resize to, antialiased bicubic, cropped at the centre where the aspect ratio differs;
            None: sizes must agree.
        strict: Whether a damaged file or a folder that cannot be listed is an error: headers are checked here, and a
            file damaged further in is named when it is decoded. If not, every file is decoded once here, and those
            that cannot be are left out.

    Attributes:
        labels: [N] number of the sub-folder, in the order of names; None where there are none.
        skipped: Why each file or folder was left out, by its path.

    Raises:
        DataError: no images, mixed sizes without `image_size`, a run folder, or, if `strict`, a file that is not an
            image or deeper than 8 bits, or a folder that cannot be listed.
    """

    labels: Tensor | None = None

    def __init__(self, root: Path, image_size: tuple[int, int] | None = None, *, strict: bool = True) -> None:
        if is_run_folder(root):
            raise DataError(f"{root} is a run folder of fastvae train, not data. Pass a folder of images.")
        self.paths, self.skipped = _find_images(root, strict=strict)
        kept = self._check_all(str(root), image_size, strict=strict)
        self.paths = [self.paths[index] for index in kept]
        folders = sorted({path.parent for path in self.paths})
        if len(folders) > 1:
            numbers = {folder: number for number, folder in enumerate(folders)}
            self.labels = torch.tensor([numbers[path.parent] for path in self.paths], device="cpu")
            self.class_names = [folder.name for folder in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def _encoded(self, index: int) -> tuple[str, Path]:
        return str(self.paths[index]), self.paths[index]


def image_suffixes() -> frozenset[str]:
    """Suffixes of the raster formats that Pillow reads, in lower case with their dot."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('a folder of images needs Pillow: pip install "fastvae-triton[train]"') from error
    formats = Image.registered_extensions()
    return frozenset(s for s, name in formats.items() if name in Image.OPEN and name not in NOT_DECODED)


def _find_images(root: Path, *, strict: bool) -> tuple[list[Path], dict[str, str]]:
    """The image files below `root`, sorted, and why each other file or folder is left out."""
    suffixes = image_suffixes()
    paths: list[Path] = []
    skipped: dict[str, str] = {}

    def unlisted(error: OSError) -> None:
        if strict:
            raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror}. Set its permissions.")
        skipped[str(error.filename)] = f"the folder cannot be listed: {error.strerror}"

    seen: set[tuple[int, int]] = set()
    pending = [root]  # links wait until what they may point to was read under its own name
    for top in pending:
        for name, folders, files in os.walk(top, onerror=unlisted):
            folder = Path(name)
            if not _is_new(folder, seen):
                folders.clear()
                continue
            inner = [folder / entry for entry in sorted(folders) if not entry.startswith(".")]
            runs = {path for path in inner if is_run_folder(path)}
            skipped |= {str(path): "a run folder of fastvae train" for path in runs}
            pending += [path for path in inner if path.is_symlink() and path not in runs]
            folders[:] = [path.name for path in inner if not path.is_symlink() and path not in runs]
            for path in (folder / entry for entry in files if not entry.startswith(".")):
                if path.suffix.lower() not in suffixes:
                    skipped[str(path)] = "its suffix is not that of a kind of image that Pillow reads"
                elif _is_file(path):
                    paths.append(path)
                else:
                    skipped[str(path)] = "not a file, or a link to none"
    if not paths:
        first = "".join(f", such as {path}: {reason}" for path, reason in list(skipped.items())[:1])
        raise DataError(
            f"no images in {root}: looked there and in its sub-folders for {', '.join(sorted(suffixes))}"
            f" and found {len(skipped) or 'no'} other files{first}. Pass a folder of images."
        )
    return sorted(paths), skipped


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # reading it will tell why
        return True


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the folder was not seen before, under another name say; adds it."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    is_new = identity not in seen
    seen.add(identity)
    return is_new
