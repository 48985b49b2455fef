import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvae.data import DataError, FolderImages, load

Image = pytest.importorskip("PIL.Image", reason="folders of images are read with Pillow")


def save(path, mode="L", size=(7, 5), **options) -> np.ndarray:
    """An image of random pixels; `size` is PIL's (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise[..., 0] if mode in ("L", "1", "P", "LA") else noise[..., :3]).convert(mode)
    image.save(path, **options)
    return np.array(image)


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    b = save(tmp_path / "b.PNG")
    c = save(tmp_path / "a" / "c.bmp")
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".thumbs" / "d.png")
    (tmp_path / "labels.csv").write_text("b,1")
    dataset = load(str(tmp_path))
    assert isinstance(dataset, FolderImages)
    assert dataset.shape == (1, 5, 7)
    assert dataset[0].dtype == torch.uint8
    assert [path.name for path in dataset.paths] == ["c.bmp", "b.PNG"]
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert np.array_equal(batch[:, 0], np.stack([c, b]))


def pillow(path, mode=None) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert(mode))


def require_writer(suffix):
    if Image.registered_extensions().get(f".{suffix}") not in Image.SAVE:
        pytest.skip(f"this Pillow does not write .{suffix}")


FORMATS = ["png", "jpg", "jpeg", "jfif", "bmp", "dib", "webp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "tga", "pcx"]


@pytest.mark.parametrize("suffix", [*FORMATS, "sgi", "jp2", "avif", "ico", "dds", "xbm", "qoi"])
def test_every_format_decodes_to_the_pixels_of_pillow(tmp_path, suffix):
    require_writer(suffix)
    mode = {"gif": "P", "pgm": "L", "pbm": "1", "xbm": "1"}.get(suffix, "RGB")
    save(tmp_path / f"x.{suffix}", mode, size=(16, 16) if suffix == "ico" else (7, 5))
    expected = pillow(tmp_path / f"x.{suffix}", "RGB").transpose(2, 0, 1)
    assert np.array_equal(load(str(tmp_path))[0].expand(3, -1, -1), expected)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "L"], 1), (["1", "LA"], 1), (["L", "RGB"], 3), (["P"], 3), (["RGBA"], 3), (["L", "RGBA"], 3)],
    ids=str,
)
def test_images_stay_grey_only_if_all_are(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        save(tmp_path / f"{i}.png", mode)
    dataset = load(str(tmp_path))
    assert dataset.shape == (channels, 5, 7)
    assert all(image.shape == (channels, 5, 7) for image in dataset)


def test_transparent_palette_does_not_warn(tmp_path):
    save(tmp_path / "x.png", "P", transparency=bytes(range(256)))
    expected = pillow(tmp_path / "x.png", "RGBA")[..., :3].transpose(2, 0, 1)
    assert np.array_equal(load(str(tmp_path))[0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_images_are_turned_upright_in_every_format(tmp_path, suffix, strict, orientation):
    require_writer(suffix)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if suffix == "webp" else {}
    save(tmp_path / f"x.{suffix}", "RGB", **lossless)
    lying = pillow(tmp_path / f"x.{suffix}")
    save(tmp_path / f"x.{suffix}", "RGB", exif=exif, **lossless)
    upright = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: np.transpose(x, (1, 0, 2)),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.transpose(np.rot90(x, 2), (1, 0, 2)),
        8: np.rot90,
    }[orientation](lying)
    dataset = load(str(tmp_path), strict=strict)
    assert dataset.shape == (3, *upright.shape[:2])
    assert np.abs(dataset[0].numpy().astype(int) - upright.transpose(2, 0, 1)).max() <= (40 if suffix == "avif" else 0)


def png_chunks(content: bytes) -> list[bytes]:
    chunks, place = [], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place:end])
        place = end
    return chunks


def test_orientation_after_the_pixels_of_a_png_is_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.png", "RGB", exif=exif)
    content = (tmp_path / "x.png").read_bytes()
    head, *rest = png_chunks(content)
    tag = next(chunk for chunk in rest if chunk[4:8] == b"eXIf")
    *rest, end = [chunk for chunk in rest if chunk is not tag]
    (tmp_path / "x.png").write_bytes(content[:8] + b"".join([head, *rest, tag, end]))
    dataset = load(str(tmp_path))
    assert dataset.shape == dataset[0].shape == (3, 7, 5)


def test_mixed_sizes_need_image_size(tmp_path):
    save(tmp_path / "a.png", size=(7, 5))
    save(tmp_path / "b.png", size=(8, 5))
    with pytest.raises(DataError, match=r"a\.png is 5 x 7 .*b\.png is 5 x 8 .*--image-size H W"):
        load(str(tmp_path))
    dataset = load(str(tmp_path), image_size=(4, 3))
    assert dataset.shape == (1, 4, 3)
    # the part with an aspect ratio of 3:4 at the centre, 3.75 of 8 pixels wide
    box = (2.125, 0, 5.875, 5)
    expected = Image.fromarray(pillow(tmp_path / "b.png")).resize((3, 4), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(dataset[1][0], np.array(expected))


def test_file_that_is_no_image_is_named_on_loading(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"b\.png is not an image"):
        load(str(tmp_path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    save(path, "RGB", size=(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"x\.{suffix} is "):
        load(str(tmp_path))[0]


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", np.uint16), ("pgm", np.uint16), ("tif", np.uint16), ("tif", np.float32)]
)
def test_deep_images_are_refused_rather_than_cut_off(tmp_path, suffix, dtype):
    Image.fromarray(np.full((4, 4), 40000, dtype)).save(tmp_path / f"x.{suffix}")
    with pytest.raises(DataError, match=rf"x\.{suffix} has more than 8 bits"):
        load(str(tmp_path))


def test_image_that_changes_its_size_is_named(tmp_path):
    save(tmp_path / "a.png")
    dataset = load(str(tmp_path))
    save(tmp_path / "a.png", size=(8, 5))
    with pytest.raises(DataError, match=r"a\.png is now 5 x 8 .* was 5 x 7"):
        dataset[0]


def test_image_that_vanishes_is_named(tmp_path):
    save(tmp_path / "a.png")
    dataset = load(str(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        dataset[0]


def test_too_large_image_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png is damaged or too large"):
        load(str(tmp_path))


def test_permissions_are_called_by_their_name(tmp_path, monkeypatch):
    save(tmp_path / "a.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"a\.png cannot be read: Permission denied\. Set"):
        load(str(tmp_path))


# what a folder leaves out


def test_links_to_folders_are_followed_once(tmp_path):
    inside = save(tmp_path / "set" / "b" / "x.png")
    outside = save(tmp_path / "elsewhere" / "y.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "set" / "b")  # the same images under another name
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b" / "self").symlink_to(tmp_path / "set" / "b" / "self")  # no folder at all
    dataset = load(str(tmp_path / "set"))
    assert [path.relative_to(tmp_path / "set").as_posix() for path in dataset.paths] == ["b/x.png", "c/y.png"]
    assert np.array_equal(dataset[0][0], inside)
    assert np.array_equal(dataset[1][0], outside)
    assert dataset.labels.tolist() == [0, 1]
    assert list(dataset.skipped) == [str(tmp_path / "set" / "b" / "self")]


def test_what_is_left_out_is_listed(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "closed" / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    scan = os.scandir

    def scandir(path):
        if os.fspath(path) == str(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    dataset = load(str(tmp_path), strict=False)
    assert len(dataset) == 1
    reasons = {path.removeprefix(f"{tmp_path}/"): reason for path, reason in dataset.skipped.items()}
    assert sorted(reasons) == ["closed", "lost.png", "notes.txt"]
    assert reasons["closed"] == "the folder cannot be listed: Permission denied"
    assert "suffix" in reasons["notes.txt"]
    with pytest.raises(DataError, match=r"closed cannot be listed: Permission denied"):
        load(str(tmp_path))


def test_what_was_found_instead_of_images_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.data")
    with pytest.raises(DataError, match=r"found 1 other files, such as .*a\.data: its suffix is not"):
        load(str(tmp_path))


@pytest.fixture
def root():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def not_the_superuser(root):
    is_superuser = os.geteuid() == 0
    if is_superuser:  # whom no permission stops
        os.seteuid(65534)
    yield
    if is_superuser:
        os.seteuid(0)


@pytest.fixture
def closed_folders(root):
    save(root / "open" / "a.png")
    for name in ("unlisted", "unentered"):
        save(root / name / "a.png")
    (root / "unlisted").chmod(0o000)
    (root / "unentered").chmod(0o444)  # its files are seen and cannot be opened
    yield
    for name in ("unlisted", "unentered"):
        (root / name).chmod(0o755)


@pytest.mark.usefixtures("closed_folders", "not_the_superuser")
def test_folders_without_permission_are_listed(root):
    dataset = load(str(root), strict=False)
    with pytest.raises(DataError, match="Permission denied"):
        load(str(root))
    assert [path.parent.name for path in dataset.paths] == ["open"]
    reasons = {path.removeprefix(f"{root}/"): reason for path, reason in dataset.skipped.items()}
    assert sorted(reasons) == ["unentered/a.png", "unlisted"]
    assert all("Permission denied" in reason for reason in reasons.values())


def test_run_folders_are_no_data(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "runs" / "first" / "samples.png")
    save(tmp_path / "runs" / "first" / "progress" / "epoch-001.png")
    options = {"data": str(tmp_path), "resume": None, "checkpoint_every": 200}
    (tmp_path / "runs" / "first" / "config.json").write_text(json.dumps(options))
    save(tmp_path / "mine" / "b.png")
    (tmp_path / "mine" / "config.json").write_text('{"data": 1}')  # another program's
    dataset = load(str(tmp_path))
    assert [path.name for path in dataset.paths] == ["a.png", "b.png"]
    assert dataset.skipped[str(tmp_path / "runs" / "first")] == "a run folder of fastvae train"
    with pytest.raises(DataError, match="is a run folder of fastvae train, not data"):
        load(str(tmp_path / "runs" / "first"))
