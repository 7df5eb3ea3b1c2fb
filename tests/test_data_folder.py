"""Image folders: real JPEG and PNG files of every kind, good and bad."""

import dataclasses
import io
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastanchor.data import decode, folder
from fastanchor.data.sources import load
from fastanchor.errors import UserError

SIZE = (6, 5)  # (H, W)


def picture(number, size=SIZE):
    """Random RGB pixels with the number in the first pixel."""
    pixels = np.random.RandomState(number).randint(0, 256, (*size, 3)).astype(np.uint8)
    pixels[0, 0] = number // 256, number % 256, 7
    return pixels


def number_of(image):
    return 256 * int(image[0, 0, 0]) + int(image[0, 0, 1])


@pytest.fixture
def root(tmp_path):
    """Two classes with eight PNG files each in train and four in test; the number is the place in sorted order."""
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / part / name
            directory.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(label * count + i)).save(directory / f"{i}.png")
    return tmp_path


def refusal(root, **settings):
    with pytest.raises(UserError) as error:
        load(f"folder:{root}", **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def both(data):
    """Numbers of all images of train and val, in rising order."""
    return sorted(number_of(image) for part in (data.train, data.val) for image in part.images)


def test_images_and_labels_in_sorted_order(root):
    data = load(f"folder:{root}", val_fraction=0.25)
    assert data.class_names == ("cat", "dog") and data.image_shape == SIZE and data.notes == ()
    assert [number_of(image) for image in data.test.images] == list(range(8))
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4
    assert all(np.array_equal(image.numpy(), picture(i)) for i, image in enumerate(data.test.images))
    assert both(data) == list(range(16)) and data.val.labels.tolist() == [0, 0, 1, 1]
    for part in (data.train, data.val):
        assert [number_of(image) // 8 for image in part.images] == part.labels.tolist()


def test_jpeg_of_any_suffix_in_paths_with_spaces_and_other_alphabets(tmp_path):
    base = tmp_path / "my images 日本"
    for part in ("train", "test"):
        for name in ("chat noir", "été", "собака"):
            (base / part / name).mkdir(parents=True)
            for file in ("a b.JPG", "ü.jpeg", "c.Png"):
                kind = "PNG" if file.endswith("Png") else "JPEG"
                Image.fromarray(picture(1, (16, 16))).save(base / part / name / file, kind)
            (base / part / name / "notes.txt").write_text("no image")
            (base / part / name / "._a b.JPG").write_bytes(b"left by another system")
        (base / part / "readme.md").write_text("no class")
        (base / part / ".cache").mkdir()
    data = load(f"folder:{base}")
    assert data.class_names == ("chat noir", "été", "собака")
    assert len(data.train) + len(data.val) == 9 and len(data.test) == 9
    # The JPEG copies differ from the PNG, but not by much more than their compression loses.
    assert np.abs(data.test.images[0].int().numpy() - picture(1, (16, 16)).astype(int)).mean() < 60


def test_name_that_is_not_utf8(root):
    name = os.fsencode(root) + b"/train/caf\xe9"
    for part in (b"/train", b"/test"):
        shutil.copytree(os.fsencode(root) + part + b"/cat", os.fsencode(root) + part + b"/caf\xe9")
    data = load(f"folder:{root}")
    assert data.class_names == ("caf\\udce9", "cat", "dog")
    with open(name + b"/0.png", "wb"):
        pass
    refusal(root).encode("utf-8")  # can be printed


def test_threads_do_not_change_anything(tmp_path):
    for part, count in (("train", 90), ("test", 4)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(picture(i, (8, 8))).resize((128, 128), Image.Resampling.NEAREST)
                image.save(tmp_path / part / name / f"{i:03}.png", compress_level=1)
    arrays = folder.read(tmp_path)
    assert folder.PIXELS_WORTH_THREADS <= 128 * 128
    assert [number_of(image) for image in arrays.train_images] == list(range(90)) * 2


# Kinds of images


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return folder.decode(str(tmp_path / name))


def test_grey_palette_transparency_and_one_bit(tmp_path):
    grey = picture(0)[..., 0]
    assert np.array_equal(saved(tmp_path, Image.fromarray(grey)), np.stack([grey] * 3, -1))
    pixels = (picture(1) // 128 * 255).astype(np.uint8)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.WEB)
    assert np.array_equal(saved(tmp_path, palette), pixels)
    assert np.array_equal(saved(tmp_path, palette, transparency=bytes([0] * 200)), pixels)
    alpha = np.dstack([picture(2), np.full(SIZE, 9, np.uint8)])
    assert np.array_equal(saved(tmp_path, Image.fromarray(alpha)), picture(2))
    bits = np.indices(SIZE).sum(0) % 2 == 0
    assert np.array_equal(saved(tmp_path, Image.fromarray(bits)), np.repeat(bits[..., None] * np.uint8(255), 3, 2))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = np.array([[0, 128, 129, 257, 1000], [20000, 32768, 65278, 65407, 65535]], np.uint16)
    found = saved(tmp_path, Image.fromarray(levels))
    assert np.array_equal(found, np.repeat(np.rint(levels / 257).astype(np.uint8)[..., None], 3, 2))
    assert found[0, :3, 0].tolist() == [0, 0, 1] and found[1].max(-1).tolist() == [78, 128, 254, 255, 255]


def test_cmyk_jpeg(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = saved(tmp_path, red, "x.jpg", quality=95).astype(int)
    assert np.abs(found - [255, 0, 0]).max() < 16


def test_image_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40], wide[:, 40:] = (50, 100, 150), 255
    image = Image.fromarray(wide)
    image.save(tmp_path / "x.png")
    found = folder.decode(str(tmp_path / "x.png"), 10)
    assert found.shape == (10, 10, 3) and np.all(found == (50, 100, 150))
    smooth = Image.fromarray(picture(3, (5, 4))).resize((120, 150), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "y.png")
    reference = np.asarray(smooth.resize((40, 50), Image.Resampling.BILINEAR))[5:45]
    found = folder.decode(str(tmp_path / "y.png"), 40)
    assert np.array_equal(found[1:-1], reference[1:-1])  # in the outermost rows that one mixes in what lies outside


def test_images_of_many_sizes_with_image_size(root):
    Image.fromarray(picture(3, (30, 9))).save(root / "train" / "cat" / "3.png")
    data = load(f"folder:{root}", image_size=8)
    assert data.image_shape == (8, 8) and len(data.train) + len(data.val) == 16
    for size in (0, 5000):
        assert f"image_size is {size} and must lie in [1, 4096] pixels" in refusal(root, image_size=size)


# Choosing before decoding


def test_limit_opens_the_chosen_files_only(root, monkeypatch):
    opened = []
    original = decode.open_regular
    monkeypatch.setattr(decode, "open_regular", lambda path: opened.append(path) or original(path))
    data = load(f"folder:{root}", limit=6)
    assert len(data.train) + len(data.val) == 6 and len(data.test) == 6
    assert len(set(opened)) == 12
    assert both(load(f"folder:{root}", limit=6)) == both(data) != both(load(f"folder:{root}", limit=6, split_seed=3))
    assert "limit is 3 and must be at least 4, two images for each of 2 classes" in refusal(root, limit=3)


# What is wrong, and where


def test_odd_size_names_file_and_both_sizes(root):
    odd = root / "train" / "cat" / "0.png"  # the first file of all: the others are right
    Image.fromarray(picture(0, (9, 7))).save(odd)
    text = refusal(root)
    assert f"{str(odd)!r} is 7x9 where 5x6 is expected (--data.image-size N resizes all images)" in text
    assert "--data.skip-broken leaves such files out" in text
    data = load(f"folder:{root}", skip_broken=True)
    assert both(data) == list(range(1, 16)) and data.notes == ("Left out 1 broken or odd-sized file: 'train/cat/0.png'.",)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(picture(0, (64, 64))).save(buffer, "JPEG")
    return buffer.getvalue()


def gif():
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty, with 0 bytes where a JPEG or PNG image should be"),
        (b"plain text", "is not a JPEG or PNG image, or is damaged at its beginning"),
        (gif(), "is not a JPEG or PNG image but GIF, whatever its name says"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n", "is not a JPEG or PNG image"),
        (jpeg()[:700], "cannot be read (image file is truncated"),
        (png(5, 6, b"\0\0\0"), "cannot be read (image file is truncated"),
        (png(20000, 10000), "cannot be read (Image size (200000000 pixels) exceeds limit"),
        (png(8000, 7000), "has 8000x7000 pixels, more than the allowed 50,000,000"),
    ],
)
def test_broken_file_is_named_with_its_fault(root, content, text):
    broken = root / "test" / "dog" / "2.png"
    broken.write_bytes(content)
    found = refusal(root)
    assert f"{str(broken)!r} {text}" in found and "--data.skip-broken" in found
    data = load(f"folder:{root}", skip_broken=True)
    assert [number_of(image) for image in data.test.images] == [0, 1, 2, 3, 4, 5, 7]
    assert data.test.labels.tolist() == [0] * 4 + [1] * 3
    assert data.notes == ("Left out 1 broken or odd-sized file: 'test/dog/2.png'.",)


def test_a_cut_file_is_refused_or_complete(tmp_path):
    """Only an end mark may be missing; no cut raises anything but BrokenImage or lets a part of an image pass."""
    path, refused = tmp_path / "x.jpg", 0
    for content in (jpeg(), png(5, 6, b"".join(b"\0" + bytes(range(row, row + 15)) for row in range(6)))):
        path.write_bytes(content)
        whole = folder.decode(str(path))
        for keep in [*range(0, len(content), 13), *range(len(content) - 30, len(content))]:
            path.write_bytes(content[:keep])
            try:
                assert np.array_equal(folder.decode(str(path)), whole), keep
            except folder.BrokenImage:
                refused += 1
                continue
            assert keep > len(content) - 24, keep
    assert refused > 100


def test_the_first_bad_file_in_order_is_named(root):
    for file in ("7.png", "1.png", "5.png"):
        truncate(root / "train" / "dog" / file, 40)
    assert "dog/1.png" in refusal(root)


def test_notes_list_five_and_count_the_rest(root):
    for i in range(7):
        truncate(root / "train" / "cat" / f"{i}.png", 20)
    data = load(f"folder:{root}", skip_broken=True)
    names = ", ".join(f"'train/cat/{i}.png'" for i in range(5))
    assert data.notes == (f"Left out 7 broken or odd-sized files: {names} and 2 more.",)


def test_folder_pipe_and_link_loop_with_an_image_name(root):
    directory = root / "train" / "cat"
    (directory / "a.png").mkdir()
    assert "a.png' cannot be read (is a folder, not a file)" in refusal(root)
    (directory / "a.png").rmdir()
    os.mkfifo(directory / "a.png")
    assert "a.png' cannot be read (is not a regular file)" in refusal(root)
    (directory / "a.png").unlink()
    (directory / "a.png").symlink_to("a.png")
    assert "a.png' cannot be read (Too many levels of symbolic links)" in refusal(root)


def test_links_to_folders_are_followed_one_level(root):
    (root / "train" / "cat" / "back").symlink_to(root, target_is_directory=True)
    shutil.move(root / "train" / "dog", root / "elsewhere")
    (root / "train" / "dog").symlink_to(root / "elsewhere", target_is_directory=True)
    assert both(load(f"folder:{root}")) == list(range(16))
    for part in ("train", "test"):
        (root / part / "loop").symlink_to("loop")
    assert "class 'loop' is empty" in refusal(root)
    data = load(f"folder:{root}", skip_broken=True)
    assert data.class_names == ("cat", "dog") and data.notes == (
        "1 sub-folder in 'train/cat' is not used.", "Left out 1 class without images: 'loop'.",
    )  # fmt: skip


def test_empty_class(root):
    for part in ("train", "test"):
        (root / part / "ant").mkdir()
    assert refusal(root) == (
        f"class 'ant' is empty: no jpg, jpeg or png file in {str(root / 'train' / 'ant')!r}; "
        "--data.skip-broken leaves such classes out"
    )
    data = load(f"folder:{root}", skip_broken=True)
    assert data.class_names == ("cat", "dog") and data.notes == ("Left out 1 class without images: 'ant'.",)
    Image.fromarray(picture(0)).save(root / "train" / "ant" / "0.png")
    assert f"class 'ant' is empty: no jpg, jpeg or png file in {str(root / 'test' / 'ant')!r}" in refusal(root)


def test_class_whose_files_are_all_broken_is_left_out_and_labels_move_up(root):
    for part in ("train", "test"):
        shutil.copytree(root / part / "cat", root / part / "ant")
    for path in (root / "test" / "ant").iterdir():
        truncate(path, 30)
    data = load(f"folder:{root}", skip_broken=True)
    assert data.class_names == ("cat", "dog") and data.test.labels.tolist() == [0] * 4 + [1] * 4
    assert both(data) == list(range(16))
    assert data.notes[1] == "Left out 1 class without images: 'ant'."
    for path in (root / "train" / "cat").iterdir():
        truncate(path, 30)
    text = refusal(root, skip_broken=True)
    assert "has 1 class with images in train and test once 12 broken or odd-sized files are left out" in text


def test_nothing_but_broken_files(root):
    for path in root.glob("*/*/*.png"):
        truncate(path, 10)
    assert "is not a JPEG or PNG image" in refusal(root)
    assert "has 0 classes with images in train and test once 24 broken" in refusal(root, skip_broken=True)


def test_classes_must_agree(root):
    (root / "test" / "emu").mkdir()
    assert "class 'emu' is in test but not in train, and both need the same classes" in refusal(root)
    shutil.rmtree(root / "test" / "emu")
    shutil.rmtree(root / "test" / "cat")
    assert "class 'cat' is in train but not in test" in refusal(root, skip_broken=True)


def test_one_class_or_none(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "cat")
    assert "has 1 class with images in train and test, and at least 2 are needed" in refusal(root)
    shutil.rmtree(root / "train" / "dog")
    assert "has no class folders, and it needs one for each class" in refusal(root)


def test_missing_folders_and_file_in_place_of_one(root, tmp_path):
    assert f"{str(tmp_path / 'none' / 'train')!r} is not there: an image folder has train/CLASS/*.jpg" in refusal(
        tmp_path / "none"
    )
    shutil.rmtree(root / "test")
    assert f"{str(root / 'test')!r} is not there" in refusal(root)
    (root / "test").write_text("a file")
    assert "cannot be listed: Not a directory" in refusal(root)


def test_too_many_for_the_memory(root, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(folder.np, "empty", full)
    assert "16 images of 5x6 do not fit into memory: --data.limit takes fewer" in refusal(root)


@pytest.fixture
def ordinary_user():
    """A folder of, and the rights of, a user whom file permissions bind: root reads everything."""
    base = Path(tempfile.mkdtemp())
    am_root = os.geteuid() == 0
    if am_root:
        os.chown(base, 65534, 65534)
        os.seteuid(65534)
    yield base
    if am_root:
        os.seteuid(0)
    shutil.rmtree(base)


def test_unreadable_file_and_folder(ordinary_user):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (ordinary_user / part / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(picture(i)).save(ordinary_user / part / name / f"{i}.png")
    closed = ordinary_user / "train" / "b" / "1.png"
    closed.chmod(0)
    assert f"{str(closed)!r} cannot be read (Permission denied)" in refusal(ordinary_user)
    (ordinary_user / "train" / "b").chmod(0)
    assert f"{str(ordinary_user / 'train' / 'b')!r} cannot be listed: Permission denied" in refusal(ordinary_user)
    (ordinary_user / "train" / "b").chmod(0o700)
    archive = ordinary_user / "set.npz"
    np.savez(archive, train_images=picture(0)[None])
    archive.chmod(0)
    with pytest.raises(UserError, match=r"cannot be read as \.npz data: Permission denied"):
        load(f"npz:{archive}")
    (ordinary_user / "cifar-10-python.tar.gz").touch(mode=0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load("cifar10", root=ordinary_user)
    (ordinary_user / "train").chmod(0)
    with pytest.raises(UserError, match="cannot be looked at: Permission denied"):
        load("cifar10", root=ordinary_user / "train" / "deeper")
    (ordinary_user / "train").chmod(0o700)


# Images that stay files


@pytest.fixture
def photos(tmp_path):
    """Two classes of JPEG and PNG files of many sizes, 40 in train and 12 in test; numbers are the places in sorted order."""
    base = tmp_path / "photos"
    for part, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("cat", "dog")):
            (base / part / name).mkdir(parents=True)
            for i in range(count):
                place = label * count + i
                image = Image.fromarray(picture(place, (24 + place % 5, 20 + place % 7)))
                image.save(base / part / name / f"{i:02}.{'png' if i % 3 else 'jpg'}")
    return base


def names(split):
    return [split.name(i) for i in range(len(split))]


def test_headers_tell_sizes_and_odd_files(photos):
    Image.fromarray(picture(3, (40, 30))).convert("CMYK").save(photos / "train" / "cat" / "03.jpg")
    (photos / "train" / "cat" / "03.png").unlink(missing_ok=True)
    Image.fromarray(picture(4)[..., 0]).save(photos / "test" / "dog" / "01.png")
    found = folder.index(photos, image_size=16)
    assert found.class_names == ("cat", "dog") and found.notes == () and len(found.train) == 40 and len(found.test) == 12
    assert names(found.train) == sorted(str(path) for path in (photos / "train").rglob("*.*"))
    for split in (found.train, found.test):
        sizes, odd = [], []
        for name in names(split):
            with Image.open(name) as image:
                sizes.append((image.height, image.width))
                odd.append(image.mode != "RGB")
        assert split.sizes.dtype == torch.int64 and split.sizes.T.tolist() == [list(size) for size in sizes]
        assert split.odd.tolist() == odd and sum(odd) == 1
        assert split.labels.dtype == torch.int64 and split.labels.tolist() == ["dog" in name for name in names(split)]
        assert split.image_shape == (16, 16) and split.read(5) == Path(split.name(5)).read_bytes()


@pytest.mark.parametrize("settings", [{}, {"limit": 12}, {"limit": 12, "split_seed": 7}, {"skip_broken": True}])
def test_encoded_and_decoded_hold_the_same_files_in_the_same_splits(photos, settings):
    if "skip_broken" in settings:
        truncate(photos / "train" / "cat" / "07.png", 600)  # whole at its beginning
        truncate(photos / "train" / "dog" / "02.png", 4)
        for path in (photos / "test" / "dog").iterdir():
            truncate(path, 500)
        for part in ("train", "test"):
            shutil.copytree(photos / part / "cat", photos / part / "emu")
    for val_fraction in (0.1, 0.4):
        wanted = {"image_size": 16, "val_fraction": val_fraction, **settings}
        kept = load(f"folder:{photos}", backend="torch", **wanted)
        held = load(f"folder:{photos}", backend="resident", **wanted)
        assert kept.class_names == held.class_names == (("cat", "emu") if "skip_broken" in settings else ("cat", "dog"))
        for part in ("train", "val", "test"):
            encoded, decoded = getattr(kept, part), getattr(held, part)
            assert torch.equal(encoded.labels, decoded.labels) and len(encoded.sizes[0]) == len(encoded.odd) == len(encoded)
            assert torch.equal(encoded.images, decoded.images) and torch.equal(encoded.gather([-1, 0]), decoded.images[[-1, 0]])
        assert not set(names(kept.train)) & set(names(kept.val))
        checked = [note for note in kept.notes if note.startswith("Checked")]
        assert [note for note in kept.notes if note not in checked] == list(held.notes)
        assert checked == (["Checked 78 files by decoding each once."] if "skip_broken" in settings else [])


def test_square_files_of_one_size_need_no_image_size(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(picture(i, (9, 9))).save(tmp_path / part / name / f"{i}.png")
    found = folder.index(tmp_path)
    assert found.train.image_size == 9 and torch.equal(found.test.images, torch.from_numpy(folder.read(tmp_path).test_images))
    odd = tmp_path / "test" / "b" / "1.png"
    Image.fromarray(picture(1, (9, 8))).save(odd)
    text = refusal(tmp_path, backend="dali")
    assert f"{str(odd)!r} is 8x9 where 9x9 is expected (--data.image-size N resizes all images); --data.skip-broken" in text
    assert folder.index(tmp_path, skip_broken=True).notes == (
        "Checked 12 files by decoding each once.", "Left out 1 broken or odd-sized file: 'test/b/1.png'.",
    )  # fmt: skip


def test_oblong_files_need_an_image_size(root):
    text = refusal(root, backend="torch")
    assert "has images of 5x6, and images that are kept as files are made square: --data.image-size N says their side" in text
    assert load(f"folder:{root}", backend="auto").image_shape == SIZE


def test_broken_header_is_named_and_a_truncated_file_when_its_turn_comes(photos):
    cut = photos / "test" / "dog" / "05.png"
    truncate(cut, 600)
    data = load(f"folder:{photos}", backend="dali", image_size=16)
    with pytest.raises(UserError, match=r"dog/05.png' cannot be read \(.*truncated.*--data.skip-broken leaves such files out"):
        data.test.decode(range(len(data.test)))
    truncate(cut, 10)
    assert f"{str(cut)!r} is not a JPEG or PNG image, or is damaged" in refusal(photos, backend="dali", image_size=16)
    cut.unlink()
    os.mkfifo(cut)
    assert f"{str(cut)!r} cannot be read (is not a regular file)" in refusal(photos, backend="dali", image_size=16)


@pytest.mark.parametrize("slow", [False, True])
def test_headers_read_in_threads_or_not(photos, slow):
    chosen = dataclasses.replace(folder.choose(photos), slow=slow)
    found = folder.indexed(chosen, skip_broken=False, image_size=16)
    assert torch.equal(found.train.sizes, folder.index(photos, image_size=16).train.sizes)
    truncate(photos / "train" / "cat" / "04.png", 9)
    truncate(photos / "train" / "cat" / "02.png", 9)
    with pytest.raises(UserError, match=r"cat/02.png"):
        folder.indexed(chosen, skip_broken=False, image_size=16)


def test_store_of_files(tmp_path):
    odd = os.fsdecode(b"caf\xe9 \xff.jpg")
    paths = [
        str(tmp_path / "b" / odd),
        str(tmp_path / "a" / "1.jpg"),
        str(tmp_path / "b" / "日本.png"),
        str(tmp_path / "b" / "1.jpg"),
    ]
    for number, path in enumerate(paths):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(bytes([number] * (number + 5)))
    store = folder.Files(paths)
    again = pickle.loads(pickle.dumps(store))
    for one in (store, again):
        assert len(one) == 4 and [one.name(i) for i in range(4)] == paths
        assert [one.read(i) for i in range(4)] == [bytes([n] * (n + 5)) for n in range(4)]
    assert again.digest() == store.digest() == folder.Files(paths).digest()
    assert folder.Files(paths[::-1]).digest() != store.digest()
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "moved" / "b")
    moved = folder.Files([path.replace(str(tmp_path), str(tmp_path / "moved")) for path in paths])
    assert moved.digest() == store.digest()  # the same folder elsewhere
    Path(paths[2]).write_bytes(b"longer than before")
    assert folder.Files(paths).digest() != store.digest()
    Path(paths[2]).unlink()
    assert folder.Files(paths).digest() != store.digest()
    with pytest.raises(folder.BrokenImage, match="No such file"):
        store.read(2)
    many = folder.Files([f"/data/train/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(20_000)])
    assert len(pickle.dumps(many)) < 40 * len(many)
    assert len(folder.Files([])) == 0 and folder.Files([]).digest() != store.digest()
