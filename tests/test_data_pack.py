"""`fastanchor data pack`: real image files in, shards that other tools read out, broken and mislabelled files named, kills survived."""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastanchor import cli, cli_data
from fastanchor.cli_data import add_data, parse_size, parse_source
from fastanchor.data import decode, packed, packplan, packshard
from fastanchor.data.pack import pack
from fastanchor.data.packplan import Options
from fastanchor.errors import UserError

CLASSES = ("chat noir", "été")
SIDE = 20


class Silent:
    """A report that remembers what was said."""

    def __init__(self):
        self.said, self.new, self.kept = [], 0, 0

    def say(self, text):
        self.said.append(text)

    def begin(self, files):
        self.files = files

    def advance(self, files, size, kept=False):
        if kept:
            self.kept += files
        else:
            self.new += files

    def end(self):
        pass


def picture(seed, side=SIDE):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    """What a killed process has written stays: only a power cut would need it on the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path):
    """Two classes, eight files each in train and three in test: JPEG, PNG, grey, CMYK and 16 bits, under difficult names."""
    base = tmp_path / "my images"
    seed = 0
    for part, count in (("train", 8), ("test", 3)):
        for name in CLASSES:
            folder = base / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed += 1
                picture(seed).save(folder / f"{i} ü.jpg", "JPEG")
    odd = base / "train" / "été"
    picture(100).save(odd / "0 ü.png")
    picture(101).convert("CMYK").save(odd / "cmyk.JPG", "JPEG")
    picture(102).convert("L").save(odd / "grey.jpeg", "JPEG")
    levels = np.random.RandomState(103).randint(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    Image.fromarray(levels).save(odd / "deep.png")
    picture(104).save(os.fsencode(odd) + b"/x\xff\ny.jpg", "JPEG")
    return base


def listing(root, split):
    """Relative paths in the order in which a folder is read: classes, then names, as the file system has them."""
    return [f"{split}/{name}/{file}" for name in CLASSES for file in sorted(os.listdir(root / split / name))]


def contents(out):
    """Every file below a folder, and its bytes."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def packed_bytes(root, out, **options):
    pack(root, out, Options(**options), Silent())
    return contents(out)


def refusal(root, out, **options):
    with pytest.raises(UserError) as error:
        pack(root, out, Options(**options), Silent())
    text = str(error.value)
    assert "\n" not in text
    return text


SMALL = {"shard_bytes": 4 * SIDE * SIDE * 3}  # four images of pixels


def test_pixels_in_npy_shards_that_numpy_maps(root, tmp_path):
    out = tmp_path / "packed"
    manifest = pack(root, out, Options(**SMALL), Silent())
    assert manifest["kind"] == "uint8" and manifest["class_names"] == list(CLASSES)
    for split in ("train", "test"):
        names = listing(root, split)
        shards = [np.load(out / shard["file"], mmap_mode="r") for shard in manifest["splits"][split]["shards"]]
        assert all(isinstance(shard, np.memmap) and shard.dtype == np.uint8 and len(shard) <= 4 for shard in shards)
        expected = np.stack([decode.decode(str(root / name)) for name in names])
        assert np.array_equal(np.concatenate(shards), expected)
        labels = np.load(out / f"{split}-labels.npy")
        assert labels.dtype == np.int64 and labels.tolist() == [CLASSES.index(name.split("/")[1]) for name in names]
        written = (out / f"{split}-names.txt").read_bytes().split(b"\n")
        assert written == [os.fsencode(name).replace(b"\n", b"\\n") for name in names] + [b""]
        assert manifest["splits"][split]["counts"] == np.bincount(labels).tolist()
        if split == "train":
            assert np.allclose(manifest["mean"], expected.mean((0, 1, 2)) / 255, atol=1e-12)
            assert np.allclose(manifest["std"], expected.std((0, 1, 2)) / 255, atol=1e-12)
    assert not (out / "partial").exists() and not (out / "broken.txt").exists()


def test_image_size_makes_pixels_of_that_side(root, tmp_path):
    manifest = pack(root, tmp_path / "packed", Options(image_size=16), Silent())
    assert manifest["shape"] == [16, 16]
    images = np.load(tmp_path / "packed" / "test-00000.npy")
    assert np.array_equal(images, np.stack([decode.decode(str(root / name), 16) for name in listing(root, "test")]))


def test_files_in_tar_shards_byte_for_byte(root, tmp_path):
    out = tmp_path / "packed"
    manifest = pack(root, out, Options(kind="jpeg", shard_bytes=8000), Silent())
    assert manifest["kind"] == "jpeg" and manifest["image_size"] == SIDE
    for split in ("train", "test"):
        names = listing(root, split)
        index = np.load(out / f"{split}-index.npy", allow_pickle=False)
        assert len(index) == len(names)
        order, shards = [], manifest["splits"][split]["shards"]
        assert len(shards) > 1
        for number, shard in enumerate(shards):
            data = (out / shard["file"]).read_bytes()
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                members = tar.getmembers()
                assert all((m.uid, m.gid, m.mtime, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members)
                for image, label in zip(members[::2], members[1::2], strict=True):
                    row = int(image.name.split(".")[0])
                    source = root / names[row]
                    assert image.name.endswith(".png" if source.suffix == ".png" else ".jpg")
                    assert label.name == f"{row:09d}.cls"
                    assert tar.extractfile(image).read() == source.read_bytes()
                    assert int(tar.extractfile(label).read()) == CLASSES.index(names[row].split("/")[1])
                    entry = index[row]
                    assert entry["shard"] == number and entry["label"] == CLASSES.index(names[row].split("/")[1])
                    assert data[entry["offset"] :][: entry["length"]] == source.read_bytes()
                    assert (entry["height"], entry["width"]) == (SIDE, SIDE)
                    assert entry["odd"] == (source.name in ("cmyk.JPG", "deep.png"))
                    order.append(row)
        assert sorted(order) == list(range(len(names)))
        # What reads training shards in sequence gets the classes mixed; test stays as listed.
        assert (order == sorted(order)) == (split == "test")


def test_dali_reads_the_tar_shards(root, tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    out = tmp_path / "packed"
    manifest = pack(root, out, Options(kind="jpeg", shard_bytes=20_000), Silent())
    part = manifest["splits"]["test"]
    expected = {}
    for name in listing(root, "test"):
        expected[(root / name).read_bytes()] = CLASSES.index(name.split("/")[1])

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        image, label = fn.readers.webdataset(
            paths=[str(out / shard["file"]) for shard in part["shards"]], ext=["jpg", "cls"],
            missing_component_behavior="error", dtypes=[types.UINT8, types.UINT8],
        )  # fmt: skip
        return image, label

    reader = pipeline()
    reader.build()
    found = {}
    for _ in range(part["images"]):
        image, label = reader.run()
        found[np.asarray(image[0]).tobytes()] = int(np.asarray(label[0]).tobytes())
    assert found == expected


def test_auto_keeps_pixels_up_to_64_and_files_above(tmp_path):
    for side, kind in ((64, "uint8"), (65, "jpeg")):
        root = tmp_path / f"{side}"
        for seed, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
            (root / place).mkdir(parents=True)
            picture(seed, side).save(root / place / "1.png")
        assert pack(root, tmp_path / f"packed {side}", Options(skip_broken=True), Silent())["kind"] == kind
    assert pack(root, tmp_path / "smaller", Options(image_size=64), Silent())["shape"] == [64, 64]
    picture(5, 50).save(root / "train/a/2.png")
    assert "has images of 65x65, 50x50, and squares of one size" in refusal(root, tmp_path / "x")
    assert "pixels are stored in one size: --image-size N says the side" in refusal(root, tmp_path / "x", kind="uint8")
    for side in (0, 7, 4097):
        text = refusal(tmp_path / "no source", tmp_path / "x", image_size=side)
        assert text == f"--image-size is {side} and must lie in [8, 4096] pixels"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
def test_all_broken_files_are_named_at_the_end_and_the_next_command_leaves_them_out(root, tmp_path, kind):
    options = {"kind": kind, "shard_bytes": 8000}
    good = (root / "train/été/1 ü.jpg").read_bytes()
    (root / "train/été/1 ü.jpg").write_bytes(good[: len(good) // 2])
    (root / "train/chat noir/text.jpg").write_text("this is no image")
    (root / "test/été/empty.png").write_bytes(b"")
    (root / "test/été/nowhere.png").symlink_to("gone")
    picture(1, 33).save(root / "train/été/large.jpg")
    out = tmp_path / "packed"
    text = refusal(root, out, **options)
    assert "has 5 broken files ('train/chat noir/text.jpg' is not a JPEG or PNG image" in text
    assert "broken.txt' lists them, and the same command with --skip-broken leaves them out" in text
    lines = (out / "broken.txt").read_bytes().decode("utf-8").splitlines()
    broken = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    assert list(broken) == [
        "train/chat noir/text.jpg", "train/été/1 ü.jpg", "train/été/large.jpg", "test/été/empty.png", "test/été/nowhere.png",
    ]  # fmt: skip
    assert "33x33 where 20x20 is expected" in broken["train/été/large.jpg"]
    assert not (out / "manifest.json").exists()
    again = Silent()
    manifest = pack(root, out, Options(**options, skip_broken=True), again)
    assert again.new == 0 and again.kept == again.files == len(listing(root, "train")) + len(listing(root, "test"))
    assert [entry["file"] for entry in manifest["left_out"]] == list(broken)
    assert manifest["splits"]["train"]["images"] == len(listing(root, "train")) - 3
    assert any("Left out when packed: 5 broken files" in note for note in manifest["notes"])
    assert contents(out) == packed_bytes(root, tmp_path / "at once", **options, skip_broken=True)
    names = (out / "train-names.txt").read_bytes().decode("utf-8", "surrogateescape")
    assert "text.jpg" not in names and "1 ü.jpg" in names


def test_a_repaired_file_of_the_same_size_is_taken_up(root, tmp_path):
    path = root / "train/été/1 ü.jpg"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    out = tmp_path / "packed"
    assert "1 broken file" in refusal(root, out, **SMALL)
    path.write_bytes(good)
    assert packed_bytes(root, out, **SMALL) == packed_bytes(root, tmp_path / "whole", **SMALL)


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
def test_one_picture_under_two_classes_in_train_and_test_and_twice(root, tmp_path, kind):
    shutil.copy(root / "train/chat noir/3 ü.jpg", root / "train/été/wrong.jpg")
    shutil.copy(root / "train/chat noir/4 ü.jpg", root / "test/chat noir/leak.jpg")
    shutil.copy(root / "train/chat noir/5 ü.jpg", root / "train/chat noir/twice.jpg")
    options, out = {"kind": kind, "shard_bytes": 8000}, tmp_path / "packed"
    text = refusal(root, out, **options)
    assert "has 2 mislabelled files, the same picture under several classes" in text
    assert "('train/chat noir/3 ü.jpg' = 'train/été/wrong.jpg')" in text
    assert "train/été/wrong.jpg\tis the same picture as 'train/chat noir/3 ü.jpg'" in (out / "broken.txt").read_text()
    manifest = pack(root, out, Options(**options, skip_broken=True), Silent())
    assert manifest["duplicates"] == {
        "mislabelled": [["train/chat noir/3 ü.jpg", "train/été/wrong.jpg"]],
        "leaked": [["train/chat noir/4 ü.jpg", "test/chat noir/leak.jpg"]],
        "repeated": 1,
    }
    notes = " ".join(manifest["notes"])
    assert "1 picture of test is in train as well: 'train/chat noir/4 ü.jpg' = 'test/chat noir/leak.jpg'" in notes
    assert "1 file repeats a picture" in notes
    # Neither copy is in any shard; the other two kinds stay.
    names = (out / "train-names.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    assert "train/chat noir/3 ü.jpg" not in names and "train/été/wrong.jpg" not in names
    assert "train/chat noir/4 ü.jpg" in names and "train/chat noir/twice.jpg" in names
    doubtful = (root / "train/été/wrong.jpg").read_bytes()
    for shard in manifest["splits"]["train"]["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert doubtful not in data and decode.decode(doubtful).tobytes() not in data
    assert contents(out) == packed_bytes(root, tmp_path / "at once", **options, skip_broken=True)


def test_a_class_of_which_nothing_is_left(root, tmp_path):
    for path in (root / "test/été").iterdir():
        path.write_text("none")
    assert "class 'été' has no image in test that can be used" in refusal(root, tmp_path / "packed", skip_broken=True)
    with pytest.raises(UserError, match="did not finish, and the same fastanchor data pack, given again, goes on or tells why"):
        packed.read(tmp_path / "packed")
    (root / "test").rename(root / "val")
    assert "class 'été' has no image in test" in refusal(root, tmp_path / "val", skip_broken=True)
    shutil.rmtree(root / "train")
    assert "is not there" in refusal(root, tmp_path / "other")


def test_the_layout_with_val(root, tmp_path):
    (root / "test").rename(root / "val")
    manifest = pack(root, tmp_path / "packed", Options(), Silent())
    names = (tmp_path / "packed/test-names.txt").read_bytes().decode().splitlines()
    assert names == listing(root, "val") and "val is the test part" in manifest["notes"][0]


def test_classes_and_labels_files(root, tmp_path):
    (root / "train/third").mkdir()
    picture(7).save(root / "train/third/1.jpg")
    (tmp_path / "classes.txt").write_text("été\nchat noir\n")
    manifest = pack(root, tmp_path / "packed", Options(classes=tmp_path / "classes.txt"), Silent())
    assert manifest["class_names"] == ["été", "chat noir"]
    rows = [f"{name},{name.split('/')[1]}" for name in listing(root, "test")]
    rows[0] = rows[0].replace(",chat noir", ",été")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    text = refusal(root, tmp_path / "x", classes=tmp_path / "classes.txt", labels=tmp_path / "labels.csv")
    assert "1 file mislabelled ('test/chat noir/0 ü.jpg' lies in 'chat noir' and line 1 says 'été')" in text
    assert "--skip-broken leaves" in text and "--data." not in text


def killed(root, out, options, place):
    """Pack in a process that kills itself at its `place`-th look at the disk; True where it did."""

    def work():
        calls = 0

        def counting(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        os.replace, os.fsync = counting(os.replace), counting(os.fsync)
        os.unlink = counting(os.unlink)
        packshard._Hashed.write = counting(packshard._Hashed.write)
        pack(root, out, options, Silent())
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(root, tmp_path, kind):
    shutil.copy(root / "train/chat noir/3 ü.jpg", root / "train/été/wrong.jpg")
    (root / "train/été/broken.jpg").write_bytes(b"\xff\xd8")
    options = Options(kind=kind, shard_bytes=12_000, skip_broken=True)
    pack(root, tmp_path / "whole", options, Silent())
    whole = contents(tmp_path / "whole")
    for place in range(1, 1000, 3 if kind == "uint8" else 11):
        out = tmp_path / f"killed {place}"
        died = killed(root, out, options, place)
        pack(root, out, options, Silent())
        assert contents(out) == whole, place
        if not died:
            break
        shutil.rmtree(out)
    assert 10 < place < 999


def test_killed_again_and_again_it_still_advances(root, tmp_path):
    options, out = Options(shard_bytes=SIDE * SIDE * 3), tmp_path / "packed"  # as many shards as images
    pack(root, tmp_path / "whole", options, Silent())
    times = 0
    while killed(root, out, options, 60):
        times += 1
        assert times < 30
    assert times >= 3 and contents(out) == contents(tmp_path / "whole")


def test_only_what_is_not_whole_is_packed_again(root, tmp_path):
    (root / "test/été/text.jpg").write_text("no image, so that the manifest waits")
    out = tmp_path / "packed"
    refusal(root, out, **SMALL)
    shard = out / "train-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (out / "test-00000.npy").unlink()
    (out / "partial/train-00002.npy.json").write_text("{")
    again = Silent()
    pack(root, out, Options(**SMALL, skip_broken=True), again)
    assert again.new == 12 and again.kept == again.files - 12
    assert contents(out) == packed_bytes(root, tmp_path / "whole", **SMALL, skip_broken=True)


def test_another_source_or_other_options_are_refused(root, tmp_path):
    begun, done = tmp_path / "begun", tmp_path / "done"
    pack(root, done, Options(**SMALL), Silent())
    (root / "test/été/text.jpg").write_text("no image")
    refusal(root, begun, **SMALL)
    before = contents(begun)
    assert "kind was uint8 and is jpeg" in refusal(root, begun, kind="jpeg", **SMALL)
    assert "--shard-size was 4,800 bytes and is 9,600" in refusal(root, begun, shard_bytes=9600)
    assert "(its images are 20x20, and --image-size 16 makes 16x16)" in refusal(root, begun, image_size=16, **SMALL)
    assert "(it was begun without --image-size)" in refusal(root, begun, image_size=20, **SMALL)
    (tmp_path / "resized").mkdir()
    refusal(root, tmp_path / "resized", image_size=16, **SMALL)
    assert "(its images are 16x16, and without --image-size they are 20x20)" in refusal(root, tmp_path / "resized", **SMALL)
    (root / "test/été/text.jpg").rename(root / "test/été/tex2.jpg")
    assert "have other names, sizes or classes" in refusal(root, begun, **SMALL)
    (root / "test/été/tex2.jpg").rename(root / "test/été/text.jpg")
    (root / "test/été/text.jpg").write_text("as many")
    assert "the files of" in refusal(root, begun, **SMALL) and "have other names, sizes or classes" in refusal(
        root, begun, **SMALL
    )
    assert "have other names, sizes or classes" in refusal(root, done, **SMALL)
    assert contents(begun) == before


def test_an_out_that_holds_something_else_is_left_alone(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "holds other things ('thesis.tex')" in refusal(root, other)
    (other / "manifest.json").write_text('{"name": "a web page"}')
    assert "must be new or empty" in refusal(root, other)
    assert sorted(contents(other)) == ["manifest.json", "thesis.tex"]
    for place in (other / "thesis.tex", other / "thesis.tex/packed"):
        assert str(place) in (text := refusal(root, place)) and "cannot be a folder" in text and "partial" not in text
    (tmp_path / "empty").mkdir()
    assert pack(root, tmp_path / "empty", Options(), Silent())["kind"] == "uint8"


def test_an_unusable_out_is_told_before_the_source_is_listed(root, tmp_path, monkeypatch):
    monkeypatch.setattr("fastanchor.data.pack.make_plan", lambda *args: pytest.fail("listed"))
    (tmp_path / "file").write_text("text")
    for place in ("file", "file/below"):
        assert refusal(root, tmp_path / place) == f"--out '{tmp_path}/{place}' cannot be a folder: '{tmp_path}/file' is a file"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("years of work")
    assert "holds other things ('thesis.tex')" in refusal(root, tmp_path / "other")
    (tmp_path / "link").symlink_to(root)
    elsewhere = (root / "test").rename(tmp_path / "elsewhere")
    (root / "test").symlink_to(elsewhere)
    for place in (root, root / "packed", root / "train/packed", tmp_path / "link/packed", elsewhere / "packed"):
        assert "whose images are to be packed, and must lie outside" in refusal(root, place)
        assert "must lie outside" in refusal(tmp_path / "link", place)


def test_two_commands_at_once(root, tmp_path):
    import fcntl

    (tmp_path / "packed/partial").mkdir(parents=True)
    with open(tmp_path / "packed/partial/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another command is packing into it" in refusal(root, tmp_path / "packed")
    pack(root, tmp_path / "packed", Options(), Silent())


def test_a_full_disk_is_told_and_nothing_is_lost(root, tmp_path, monkeypatch):
    out, calls = tmp_path / "packed", []
    real = packshard._Hashed.write

    def full(self, data):
        calls.append(data)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(packshard._Hashed, "write", full)
        text = refusal(root, out, **SMALL)
    assert "npy' cannot be written: No space left on device; what is packed stays, and the same command goes on" in text
    assert not list(out.rglob("*.tmp"))
    report = Silent()
    pack(root, out, Options(**SMALL), report)
    assert report.kept > 0 and contents(out) == packed_bytes(root, tmp_path / "whole", **SMALL)


def test_a_file_that_changes_meanwhile(root, tmp_path, monkeypatch):
    real, path = decode.read_file, root / "test/été/2 ü.jpg"
    monkeypatch.setattr(decode, "read_file", lambda name: real(name) + (b"\0" if name == str(path) else b""))
    text = refusal(root, tmp_path / "packed")
    assert "2 ü.jpg' has" in text and "when listed: the folder changes meanwhile" in text


def test_a_huge_file_is_not_read(root, tmp_path, monkeypatch):
    with open(root / "train/été/film.jpg", "wb") as file:
        file.truncate(packshard.MAX_FILE + 1)
    assert "'train/été/film.jpg' has 256,000,001 bytes, more than the allowed" in refusal(root, tmp_path / "packed")


def test_threads_and_no_threads_write_the_same(root, tmp_path, monkeypatch):
    one = packed_bytes(root, tmp_path / "one", kind="jpeg")
    monkeypatch.setattr(decode, "PIXELS_WORTH_THREADS", 1)
    monkeypatch.setattr(decode, "threads", lambda: 4)
    assert packplan.make_plan(root, Options()).large
    assert packed_bytes(root, tmp_path / "four", kind="jpeg") == one


def test_packed_already_is_checked_and_an_altered_file_told(root, tmp_path):
    out, report = tmp_path / "packed", Silent()
    pack(root, out, Options(kind="jpeg"), Silent())
    before = contents(out)
    pack(root, out, Options(kind="jpeg"), report)
    assert "is packed already" in report.said[-1] and contents(out) == before
    data = bytearray(before["train-00000.tar"])
    data[700] ^= 1
    (out / "train-00000.tar").write_bytes(data)
    text = refusal(root, out, kind="jpeg")
    assert "train-00000.tar' is altered" in text and text.endswith(f"remove '{out}' and pack the images again")
    (out / "train-00000.tar").unlink()
    assert refusal(root, out, kind="jpeg").endswith(f"remove '{out}' and pack the images again")


def command(argv):
    parser = cli._Parser(prog="fastanchor")
    add_data(parser.add_subparsers(dest="command", parser_class=cli._Parser), "data")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments, [])


def test_the_command_packs_and_says_what_there_is(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_data, "SECONDS_A_LINE", 0)
    (root / "train/été/text.jpg").write_text("no image")
    argv = ["data", "pack", f"folder:{root}", "--out", str(tmp_path / "out"), "--as", "jpeg", "--shard-size", "8KB"]
    with pytest.raises(UserError, match="1 broken file"):
        command(argv)
    capsys.readouterr()
    assert command([*argv, "--skip-broken"]) == 0
    said = capsys.readouterr().out
    assert "28 files were packed before" in said and "note: Left out when packed: 1 broken file" in said
    assert "│ train │ 21     │" in said and f"use it: fastanchor train anchor --data packed:{tmp_path}/out" in said
    bare = str(tmp_path / "ba\udcff re")
    assert command(["data", "pack", str(root), "--out", bare, "--skip-broken"]) == 0
    assert "5 of 28 files  0." in capsys.readouterr().out.replace("\n", " ")


def test_the_command_refuses_in_one_line(root, tmp_path):
    for text, size in (("256MB", 256_000_000), ("1gb", 10**9), ("64 KB", 64_000), ("5000", 5000)):
        assert parse_size(text) == size
    for text in ("", "MB", "-1MB", "1.5MB", "10", "1000000GB", "1TBB", "٣MB"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(text)
    assert parse_source(f"folder:{root}") == parse_source(str(root)) == root
    for source, words in (("cifar10", "only an image folder"), ("npz:x.npz", "only an image"), ("folder:", "names no path"),
                          ("fodler:x", "did you mean 'folder'")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            parse_source(source)
    for argv in (["data"], ["data", "pac"], ["data", "pack", "x"], ["data", "pack", "x", "--out", "y", "--as", "png"]):
        with pytest.raises(UserError, match="see fastanchor data"):
            command(argv)
    with pytest.raises(UserError, match=r"^unrecognized arguments: --skip \(see fastanchor data pack --help\)$"):
        command(["data", "pack", "x", "--out", "y", "--skip"])
    with pytest.raises(UserError, match="is not there"):
        command(["data", "pack", "nowhere", "--out", str(tmp_path / "out")])


def test_control_c_says_that_nothing_is_lost(root, tmp_path, monkeypatch):
    argv = ["data", "pack", str(root), "--out", str(tmp_path / "out"), "--shard-size", "5KB"]
    real, left = cli_data.Progress.advance, [9]

    def advance(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cli_data.Progress, "advance", advance)
        with pytest.raises(KeyboardInterrupt, match="nothing is lost: the same command goes on"):
            command(argv)
    assert command(argv) == 0
    assert contents(tmp_path / "out") == packed_bytes(root, tmp_path / "whole", shard_bytes=5000)


def test_a_bar_on_a_terminal(root, tmp_path):
    from rich.console import Console

    screen = io.StringIO()
    progress = cli_data.Progress(Console(file=screen, force_terminal=True, width=120))
    pack(root, tmp_path / "packed", Options(), progress)
    assert "images/s" in screen.getvalue() and "27/27" in screen.getvalue()


def test_killed_from_outside_as_a_process(root, tmp_path):
    """The whole program, its own interpreter, killed by another process as soon as a shard is there."""
    out = tmp_path / "packed"
    script = (
        "import sys, time; from pathlib import Path; from fastanchor.data import decode; from fastanchor.data.pack import pack;"
        "from fastanchor.data.packplan import Options; from fastanchor.cli_data import Progress; real = decode.read_file;"
        "decode.read_file = lambda path: (time.sleep(0.05), real(path))[1];"
        f"pack(Path(sys.argv[1]), Path(sys.argv[2]), Options(shard_bytes={SMALL['shard_bytes']}), Progress())"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(root), str(out)], stdout=subprocess.DEVNULL)
    while not (out / "train-00001.npy").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    report = Silent()
    pack(root, out, Options(**SMALL), report)
    assert report.kept >= 4 and contents(out) == packed_bytes(root, tmp_path / "whole", **SMALL)
