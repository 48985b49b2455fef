import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from fastvae.data import ArrayImages, DataError, ImageDataset, absolute_source, identify, load, split
from fastvae.data.batches import load_batches
from fastvae.data.build_fashion_mnist import build


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def stacked(dataset: ImageDataset) -> torch.Tensor:
    return next(iter(DataLoader(dataset, batch_size=len(dataset))))


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


# the embedded data set


def test_embedded_images_are_fashion_mnists_test_split():
    dataset = load("fashion-mnist")
    assert len(dataset) == 10_000
    assert dataset.shape == (1, 28, 28)
    assert dataset[0].dtype == torch.uint8
    assert torch.equal(torch.bincount(dataset.labels), torch.full((10,), 1000))
    # of t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte behind their headers
    pixels, labels = dataset.images.numpy().tobytes(), dataset.labels.numpy().astype(np.uint8).tobytes()
    assert hashlib.sha256(pixels).hexdigest() == "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a"
    assert hashlib.sha256(labels).hexdigest() == "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"


def test_embedded_images_come_with_their_licence():
    import fastvae.data

    text = (Path(fastvae.data.__file__).parent / "fashion_mnist.LICENSE").read_text()
    assert "MIT License" in text
    assert "Zalando SE" in text


def test_build_recipe_gives_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    images, labels = random_images(5, 28, 28), random_images(5)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    build(tmp_path, tmp_path / "a.npz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    build(tmp_path, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    dataset = load(str(tmp_path / "a.npz"))
    assert np.array_equal(dataset.images[:, 0], images)
    assert np.array_equal(dataset.labels, labels)


# batches and splits


def test_batches_are_the_images_asked_for():
    dataset = ArrayImages(torch.from_numpy(random_images(10, 3, 4, 5)))
    batches = list(DataLoader(dataset, batch_sampler=[[3, 1], [9, 9, 0]]))
    assert torch.equal(batches[0], dataset.images[[3, 1]])
    assert torch.equal(batches[1], dataset.images[[9, 9, 0]])
    assert [image.shape for image in dataset.__getitems__([2, 4])] == [(3, 4, 5)] * 2
    assert len(list(dataset)) == 10  # ends with IndexError, not never


def test_data_set_goes_to_worker_processes():
    dataset = ArrayImages(torch.from_numpy(random_images(4, 1, 2, 2)))
    assert torch.equal(stacked(pickle.loads(pickle.dumps(dataset))), dataset.images)


@pytest.mark.parametrize(("n", "validation", "n_validation"), [(100, 0.1, 10), (2, 0.1, 1), (2, 0.9, 1), (7, 0.999, 6)])
def test_split_is_a_partition_with_two_sides(n, validation, n_validation):
    dataset = ArrayImages(torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1))
    train, held_out = split(dataset, validation=validation)
    assert len(held_out) == n_validation
    assert sorted(int(image) for side in (train, held_out) for image in side) == list(range(n))
    assert torch.equal(next(iter(DataLoader(train, batch_size=n))).flatten(), torch.tensor([int(x) for x in train]))


def test_split_depends_on_its_seed_alone():
    dataset = ArrayImages(torch.zeros(50, 1, 1, 1, dtype=torch.uint8))
    torch.manual_seed(1)
    first = split(dataset, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = split(dataset, seed=3)
    assert [side.indices for side in first] == [side.indices for side in again]
    assert split(dataset, seed=4)[1].indices != first[1].indices
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    # pinned: a resumed run must find the images that its first part held out
    assert split(dataset, seed=0)[1].indices == [44, 39, 7, 6, 17]


class Grouped(ArrayImages):
    groups = torch.arange(5).repeat_interleave(10)


@pytest.mark.parametrize("kind", [ArrayImages, Grouped])
def test_split_is_the_same_under_other_defaults(kind):
    dataset = kind(torch.zeros(50, 1, 1, 1, dtype=torch.uint8))
    expected = [side.indices for side in split(dataset)]
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert [side.indices for side in split(dataset)] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_data_is_read_under_another_default_device(tmp_path):
    np.savez(tmp_path / "x.npz", images=random_images(4, 6, 6) / 255, labels=np.arange(4))
    (tmp_path / "x-idx3").write_bytes(idx_bytes(random_images(4, 6, 6)))
    with torch.device("meta"):
        arrays = [load(str(tmp_path / "x.npz"), image_size=(3, 3)), load(f"idx:{tmp_path}")]
        batches = [next(iter(load_batches(split(dataset)[0], [[0, 1]]))) for dataset in arrays]
    assert [batch.device.type for batch in batches] == ["cpu", "cpu"]
    assert batches[0].shape == (2, 1, 3, 3)


@pytest.mark.parametrize("validation", [0, 1, -0.1, 1.5, float("nan")])
def test_split_needs_a_share(validation):
    with pytest.raises(ValueError, match="validation must be a share between 0 and 1"):
        split(load("fashion-mnist"), validation=validation)


def test_split_needs_two_images():
    with pytest.raises(DataError, match="at least 2 images"):
        split(ArrayImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)))


# arrays


@pytest.mark.parametrize(
    ("shape", "to_channels_first"),
    [((4, 5, 7), None), ((4, 5, 7, 1), (0, 3, 1, 2)), ((4, 5, 7, 3), (0, 3, 1, 2)), ((4, 3, 5, 7), (0, 1, 2, 3))],
    ids=["NHW", "NHW1", "NHW3", "N3HW"],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_array_layouts(tmp_path, shape, to_channels_first, suffix):
    images = random_images(*shape)
    path = tmp_path / f"x{suffix}"
    np.save(path, images) if suffix == ".npy" else np.savez(path, whatever=images)
    dataset = load(str(path))
    expected = images[:, None] if to_channels_first is None else images.transpose(to_channels_first)
    assert dataset.shape == expected.shape[1:]
    assert np.array_equal(stacked(dataset), expected)
    assert dataset.labels is None


def test_npy_of_bytes_stays_on_disk_and_is_never_written(tmp_path):
    images = random_images(3, 4, 4)
    np.save(tmp_path / "x.npy", images)
    dataset = load(str(tmp_path / "x.npy"))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "x.npy") in line]
    assert [line.split()[1][:2] for line in mapped] == ["r-"]
    dataset[0].zero_()  # indexing gives copies, so that writing does not end the process
    for image in dataset.__getitems__([1, 2]):
        image.zero_()
    assert np.array_equal(np.load(tmp_path / "x.npy"), images)
    assert np.array_equal(stacked(dataset)[:, 0], images)


OPENS_UNDER_A_LIMIT = """
import resource, sys
from fastvae.data import load
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 2**28, used + 2**28))  # what the process may write to
dataset = load(sys.argv[1])
print(len(dataset), dataset[len(dataset) - 1].sum().item())
"""


def test_npy_larger_than_memory_opens(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (2**20, 32, 32)).flush()  # 1 GiB, sparse
    command = [sys.executable, "-c", OPENS_UNDER_A_LIMIT, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1048576", "0"], done.stderr


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8"])
def test_floats_are_rounded_to_255ths(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("fastvae.data.arrays.CHUNK_BYTES", 300)  # several chunks, the last one shorter
    levels = random_images(11, 4, 5)
    np.save(tmp_path / "x.npy", (levels / 255).astype(dtype))
    assert np.array_equal(stacked(load(str(tmp_path / "x.npy")))[:, 0], levels)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((9, 24), (0, 4, 30, 15)),
        ((20, 8), (11, 0, 19, 20)),
        ((10, 15), (0, 0, 30, 20)),
        ((16, 8), (10, 0, 20, 20)),
    ],
)
def test_arrays_are_cropped_and_resized_as_pillow_does(size, box, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow is the standard here")
    monkeypatch.setattr("fastvae.data.arrays.CHUNK_BYTES", 2000)
    images = random_images(5, 20, 30, 3) // 2 + 64  # nothing that Pillow clips between the two directions
    np.save(tmp_path / "x.npy", images)
    dataset = load(str(tmp_path / "x.npy"), image_size=size)
    assert dataset.shape == (3, *size)
    for ours, pixels in zip(dataset, images, strict=True):
        theirs = image.fromarray(pixels).crop(box).resize(size[::-1], image.Resampling.BICUBIC)
        theirs = np.array(theirs).transpose(2, 0, 1)
        assert np.abs(ours.numpy().astype(int) - theirs).max() <= 2  # Pillow rounds between the two directions


def with_nan(array: np.ndarray) -> np.ndarray:
    array[2, 0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"x.npy: images must be \[N, H, W\].*got shape \(4, 4\)"),
        (np.zeros((2, 5, 5, 4), np.uint8), r"got shape \(2, 5, 5, 4\).*RGBA"),
        (np.zeros((2, 3, 5, 3), np.uint8), r"can be read as \[N, C, H, W\] and as \[N, H, W, C\]"),
        (np.zeros((0, 5, 5), np.uint8), "holds no images"),
        (np.zeros((2, 5, 5), np.int64), "must be uint8 .* got int64"),
        (np.zeros((2, 5, 5), bool), r"got bool.*\* 255"),
        (with_nan(np.zeros((3, 5, 5), np.float32)), "image 2 spans nan"),
        (np.full((3, 5, 5), 1.5), "image 0 spans 1.5 to 1.5"),
        (np.full((3, 5, 5), -0.1, np.float16), r"must lie in \[0, 1\]"),
        (np.array([[[{}]]], dtype=object), "x.npy cannot be read as a NumPy file"),
    ],
)
def test_unfit_array_is_named(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("keep", [0, 60, 0.7])
def test_truncated_array_is_named(tmp_path, name, keep):
    path = tmp_path / name
    (np.save if name == "x.npy" else np.savez)(path, random_images(9, 8, 8))
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(DataError, match=f"{name} cannot be read as a NumPy file"):
        load(str(path))


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_flipped_bit_is_an_error_of_the_data_or_none(tmp_path, name):
    path = tmp_path / name
    (np.save if name == "x.npy" else np.savez_compressed)(path, random_images(1, 4, 4) / 255)
    content = path.read_bytes()
    for place in range(8 * min(len(content), 400)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(DataError):
            load(str(path))


def test_npz_names_decide(tmp_path):
    images, others = random_images(3, 4, 4), np.zeros((2, 2), np.uint8)
    np.savez(tmp_path / "x.npz", others=others, images=images, labels=np.array([7, 8, 9], np.uint8))
    dataset = load(str(tmp_path / "x.npz"))
    assert np.array_equal(stacked(dataset)[:, 0], images)
    assert dataset.labels.tolist() == [7, 8, 9]
    np.savez(tmp_path / "y.npz", a=images, b=images)
    with pytest.raises(DataError, match=r"y.npz must hold an array named images.*holds a, b"):
        load(str(tmp_path / "y.npz"))
    np.savez(tmp_path / "z.npz", images=images, labels=np.zeros(2))
    with pytest.raises(DataError, match=r"z.npz: labels must be .* 3 images; got float64 of shape \(2,\)"):
        load(str(tmp_path / "z.npz"))


# IDX files


def test_idx_directory_joins_its_image_files_once(tmp_path):
    train, test = random_images(4, 5, 6), random_images(2, 5, 6)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(train)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(test))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(test)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(random_images(4)))
    (tmp_path / ".hidden-idx3").write_bytes(b"")
    assert np.array_equal(stacked(load(f"idx:{tmp_path}"))[:, 0], np.concatenate([test, train]))
    assert np.array_equal(stacked(load(f"idx:{tmp_path}/train-images-idx3-ubyte.gz"))[:, 0], train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x89PNG....", "x-idx3-ubyte is not an IDX file of unsigned bytes"),
        (bytes([0, 0, 13, 3]) + bytes(12), "is not an IDX file of unsigned bytes"),
        (bytes([0, 0, 8, 3, 0, 0]), "ends inside its IDX header, after 6 of 16 bytes"),
        (idx_bytes(random_images(2, 3, 4))[:-1], "promises 2 x 3 x 4 = 24 values and holds 23"),
        (idx_bytes(random_images(2, 3, 4)) + b"\0", "holds 25"),
        # without the time of day, which would give each worker another name for this case
        (gzip.compress(idx_bytes(random_images(2, 3, 4)), mtime=0)[:-9], "x-idx3-ubyte is a damaged gzip file"),
        (idx_bytes(random_images(5)), "x-idx3-ubyte must hold images"),
        (idx_bytes(random_images(0, 3, 4)), "holds no images"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path, content, message):
    (tmp_path / "x-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(f"idx:{tmp_path}")


def test_idx_sizes_must_agree(tmp_path):
    (tmp_path / "a-idx3").write_bytes(idx_bytes(random_images(1, 3, 4)))
    (tmp_path / "b-idx3").write_bytes(idx_bytes(random_images(1, 4, 4)))
    with pytest.raises(DataError, match=r"a-idx3 has \(3, 4\), .*b-idx3 has \(4, 4\)"):
        load(f"idx:{tmp_path}")


# sources that are none


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashon-mnist", r"named 'fashon-mnist'\. Did you mean fashion-mnist\?"),
        ("Fashion-MNIST", "Did you mean fashion-mnist"),
        ("nowhere/x.npy", "named 'nowhere/x.npy'. Pass a name"),
        ("idx:nowhere", "idx:nowhere: no such file or directory"),
        *((nothing, "the data set has no name: got ") for nothing in ("", " ", "idx:", "hf:")),
    ],
)
def test_unknown_source_is_named(source, message):
    with pytest.raises(DataError, match=message):
        load(source)


def test_other_files_and_empty_directories_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes.txt is a file of a kind"):
        load(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match="no file with idx3 in its name"):
        load(f"idx:{tmp_path}")
    with pytest.raises(DataError, match=r"no images in .* found 1 other files"):
        load(str(tmp_path))


@pytest.mark.parametrize("image_size", [(0, 4), (4, -1), (4,)])
def test_image_size_must_be_positive(image_size):
    with pytest.raises(ValueError, match="image_size must be"):
        load("fashion-mnist", image_size=image_size)


# what identifies a data set


def test_absolute_source_keeps_names_and_resolves_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "x.npy").touch()
    (tmp_path / "photos").mkdir()
    assert absolute_source("x.npy") == absolute_source("./set/../x.npy") == str(tmp_path / "x.npy")
    assert absolute_source("idx:set") == f"idx:{tmp_path / 'set'}"
    assert absolute_source("hf:set:test:img") == f"hf:{tmp_path / 'set'}:test:img"
    for name in ("photos", "fashion-mnist", "hf:someone/pictures:train", "nowhere", "", "idx:"):
        assert absolute_source(name) == name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_source("~/x.npy") == str(tmp_path / "x.npy")


def test_identity_is_that_of_the_content(tmp_path):
    images = random_images(6, 4, 4)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", images)
    first = identify(load(str(tmp_path / "a.npy")))
    assert first.images == len(first.keys) == 6
    assert identify(load(str(tmp_path / "b.npz"))).digest == first.digest
    images[3, 2, 1] ^= 1
    np.save(tmp_path / "a.npy", images)
    other = identify(load(str(tmp_path / "a.npy")))
    assert other.digest != first.digest
    assert (other.keys != first.keys).tolist() == [False] * 3 + [True] + [False] * 2
    subset = Subset(load(str(tmp_path / "a.npy")), [3, 0])
    assert identify(subset).keys.tolist() == other.keys[[3, 0]].tolist()


def test_identity_of_a_huge_array_is_that_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvae.data.dataset.HASHED_BYTES", 2**16)
    images = random_images(4097, 4, 4)
    np.save(tmp_path / "x.npy", images)
    first = identify(load(str(tmp_path / "x.npy")))
    assert first.keys is None
    for changed in (images[:-1], images[::-1].copy(), images ^ 1):
        np.save(tmp_path / "x.npy", changed)
        assert identify(load(str(tmp_path / "x.npy"))).digest != first.digest


def test_identity_of_other_data_sets(tmp_path):
    images = torch.rand(5, 1, 2, 2)

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            return (torch.rand(1, 2, 2),)

    same, other = TensorDataset(images, torch.arange(5)), TensorDataset(images.flip(0))
    assert identify(same).digest == identify(TensorDataset(images)).digest != identify(other).digest
    assert identify(Noisy(images)).digest == identify(Noisy(images)).digest
    assert identify(Noisy(images)).digest != identify(Noisy(images[1:])).digest
