"""Build the embedded data set, fashion_mnist.npz: the 10 000 test images of Fashion-MNIST and their labels.

    python -m fastvae.data.build_fashion_mnist IDX_DIR OUT.npz

IDX_DIR holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz as Debian's package dataset-fashion-mnist installs
them in /usr/share/datasets/fashion-mnist. Without installing it:

    apt-get download dataset-fashion-mnist && dpkg-deb --extract dataset-fashion-mnist_*.deb unpacked

The same input gives the same arrays, and the same bytes with the same NumPy and zlib.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .idx import read_idx

ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time stamp; np.savez_compressed would write the clock


def build(idx_dir: Path, out: Path) -> None:
    """Write `images` uint8 [10000, 28, 28] and `labels` uint8 [10000] from the IDX files of `idx_dir` to `out`."""
    arrays = {
        "images": read_idx(idx_dir / "t10k-images-idx3-ubyte.gz"),
        "labels": read_idx(idx_dir / "t10k-labels-idx1-ubyte.gz"),
    }
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=ZIP_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, _npy_bytes(array), compresslevel=9)


def _npy_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("idx_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    build(options.idx_dir, options.out)
