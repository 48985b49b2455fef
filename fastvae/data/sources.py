"""From what a user types after `--data` to a data set."""

import difflib
from pathlib import Path

from .arrays import images_from_array, load_array_file
from .dataset import DataError, ImageDataset
from .folder import FolderImages
from .hub import HubImages
from .idx import read_idx_images
from .photos import PhotoCrops

EMBEDDED = {"fashion-mnist": "fashion_mnist.npz"}
CLASS_NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NAMES = (*EMBEDDED, "photos")
FORMS = (
    f"a name ({', '.join(NAMES)}), a folder of images, a .npy or .npz file, idx:DIR with IDX files, or "
    "hf:NAME[:SPLIT[:COLUMN]]"
)


def load(source: str | Path, *, image_size: tuple[int, int] | None = None, strict: bool = True) -> ImageDataset:
    """Open a data set of images.

    | source | images |
    |---|---|
    | `fashion-mnist` | the 10 000 test images of Fashion-MNIST, [1, 28, 28], which come with the package |
    | `photos` | colour crops of photographs that scikit-image and scikit-learn carry (`PhotoCrops`), [3, 64, 64] |
    | a folder | every image file below it (`FolderImages`), decoded as asked for |
    | `x.npy` | [N, H, W], [N, H, W, C] or [N, C, H, W], C = 1 or 3, uint8 (mapped read-only) or floats in [0, 1] |
    | `x.npz` | the same, under the key `images` or as the only array; [N] whole numbers under `labels`: `.labels` |
    | `hf:NAME[:SPLIT[:COLUMN]]` | a Hugging Face data set, or a folder that its save_to_disk made (`HubImages`) |
    | `idx:DIR` | every IDX file of images in it, as MNIST's, compressed or not; `idx:FILE`: that one |

    A name comes before a folder of that name: pass `./fashion-mnist` for the folder.

    Args:
        source: As in the table; `~` is the home directory.
        image_size: (height, width) to resize every image to, antialiased, cropped at the centre where its aspect ratio
            differs; None: as they are.
        strict: Whether a damaged image in a folder or a Hugging Face data set is an error; if not, it is left out and
            listed in `.skipped`.

    Returns:
        Data set of uint8 tensors [C, H, W], with `.shape`; `DataLoader(load(source), batch_size=128)` gives batches.

    Raises:
        ImportError: a package that the source needs is not installed; the message names the extra.
        DataError: the source is unknown, empty or damaged, or its images differ in size; the message names the file.
    """
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be (height, width), both at least 1; got {image_size}. Pass (64, 64), say.")
    text = str(source)
    if text.strip() in ("", "hf:", "idx:"):
        raise DataError(f"the data set has no name: got {text!r}. Pass {FORMS}.")
    if text in EMBEDDED:
        dataset = load_array_file(Path(__file__).with_name(EMBEDDED[text]), image_size)
        dataset.class_names = CLASS_NAMES
        return dataset
    if text == "photos":
        return PhotoCrops(image_size)
    if text.startswith("hf:"):
        name, part, column, *_ = [*text.removeprefix("hf:").split(":", 2), "", ""]
        return HubImages(name, part or "train", column or None, image_size, strict=strict)
    if text.startswith("idx:"):
        path = Path(text.removeprefix("idx:")).expanduser()
        return images_from_array(read_idx_images(path), text, image_size)
    path = Path(text).expanduser()
    if path.is_dir():
        return FolderImages(path, image_size, strict=strict)
    if path.is_file():
        if path.suffix.lower() in (".npy", ".npz"):
            return load_array_file(path, image_size)
        raise DataError(f"{path} is a file of a kind that cannot be read as images. Pass {FORMS}.")
    near = difflib.get_close_matches(text.lower(), NAMES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise DataError(f"no data set, file or folder named {text!r}.{hint} Pass {FORMS}.")


def absolute_source(source: str) -> str:
    """The same source with an absolute path, if it names a file or a folder that exists; otherwise as it is."""
    kind = next((prefix for prefix in ("idx:", "hf:") if source.startswith(prefix)), "")
    name, colon, rest = source.removeprefix(kind), "", ""
    if kind == "hf:":
        name, colon, rest = name.partition(":")
    path = Path(name).expanduser()
    if source in NAMES or not name or not path.exists():
        return source
    return f"{kind}{path.resolve()}{colon}{rest}"
