"""Which files of a folder belong to which class: three layouts, class lists, label lists, and all that can be wrong with them."""

import os

import numpy as np
import pytest
from PIL import Image

from fastanchor.data import folder, listing
from fastanchor.errors import UserError


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"never opened by a listing")


def refusal(root, **settings):
    with pytest.raises(UserError) as error:
        listing.find(root, **settings)
    text = str(error.value)
    assert "\n" not in text
    text.encode("utf-8")  # can be printed
    return text


def of(found, part):
    """Relative paths by class folder."""
    paths, labels = found.files(part)
    assert labels.dtype == np.int64 and list(labels) == sorted(labels)
    names = {name: [] for name in found.names}
    for path, label in zip(paths, labels, strict=True):
        names[found.names[label]].append(os.path.relpath(path, found.root))
    return names


@pytest.fixture
def root(tmp_path):
    """Classes ant, bee and cat with three files each in train and two in test."""
    base = tmp_path / "set"
    touch(
        base,
        *(
            f"{part}/{name}/{i}.jpg"
            for part, n in (("train", 3), ("test", 2))
            for name in ("ant", "bee", "cat")
            for i in range(n)
        ),
    )
    return base


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet's layout: three classes of three training images and two validation images each."""
    base, wnids = tmp_path / "tiny", ("n01443537", "n01629819", "n02012849")
    lines = []
    for label, name in enumerate(wnids):
        touch(base, *(f"train/{name}/images/{name}_{i}.JPEG" for i in range(3)), f"train/{name}/{name}_boxes.txt")
        for i in range(2):
            file = f"val_{3 * i + label}.JPEG"
            touch(base, f"val/images/{file}")
            lines.append((3 * i + label, f"{file}\t{name}\t0\t32\t44\t62\n"))
    (base / "val" / "val_annotations.txt").write_text("".join(line for _, line in sorted(lines)))
    (base / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    touch(base, *(f"test/images/test_{i}.JPEG" for i in range(4)))
    return base


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Layouts


def test_train_and_test(root):
    touch(
        root,
        "train/ant/.hidden.jpg",
        "train/ant/a.PNG",
        "train/ant/b.JpEg",
        "train/readme.txt",
        "test/.x/1.jpg",
    )
    found = listing.find(root)
    assert (found.names, found.held_out, found.notes, found.empty) == (["ant", "bee", "cat"], "test", [], [])
    assert of(found, "train")["ant"] == [f"train/ant/{file}" for file in ("0.jpg", "1.jpg", "2.jpg", "a.PNG", "b.JpEg")]
    assert of(found, "test") == {name: [f"test/{name}/0.jpg", f"test/{name}/1.jpg"] for name in found.names}


def test_files_of_other_kinds_and_folders_are_counted(root):
    touch(root, *(f"train/bee/{i}.webp" for i in range(9)), "train/bee/more/1.jpg", "train/bee/.cache/1.jpg", "train/bee/.x.gif")
    (root / "train" / "bee" / "loop").symlink_to("loop")
    (root / "train" / "bee" / "up").symlink_to("..")
    assert listing.find(root).notes == [
        "10 files of other kinds ('.webp', 'no ending') and 2 sub-folders in 'train/bee' are not used."
    ]
    touch(root, "test/ant/a.GIF")
    assert listing.find(root).notes == [
        "11 files of other kinds ('.webp', '.gif', 'no ending') and 2 sub-folders "
        "in 2 class folders, the first 'train/bee', are not used."
    ]


def test_one_file_of_another_kind(root, tmp_path):
    touch(root, "test/cat/a.bmp")
    assert listing.find(root).notes == ["1 file of another kind ('.bmp') in 'test/cat' is not used."]
    assert listing.find(root, classes=written(tmp_path / "some.txt", "ant\nbee\n")).notes == []


def test_val_is_the_test_part_where_there_is_no_other(root):
    (root / "test").rename(root / "val")
    found = listing.find(root)
    assert found.held_out == "val" and of(found, "val")["bee"] == ["val/bee/0.jpg", "val/bee/1.jpg"]
    assert found.notes == ["There is no test folder, so val is the test part; validation images are taken out of train."]
    touch(root, "test/ILSVRC2012_test_00000001.JPEG")  # ImageNet's own test images have no classes
    found = listing.find(root)
    assert found.held_out == "val" and found.notes[0].startswith("test has no folder of a class, so val is the test part")
    (root / "val" / "cat" / "0.jpg").unlink()
    (root / "val" / "cat" / "1.jpg").unlink()
    assert f"class 'cat' is empty: no jpg, jpeg or png file in {str(root / 'val' / 'cat')!r}" in refusal(root)


def test_val_beside_test_is_not_used(root):
    touch(root, "val/ant/0.jpg")
    found = listing.find(root)
    assert found.held_out == "test" and found.notes == ["val is not used: validation images are taken out of train."]


def test_flat_val_of_imagenet_is_told(root):
    (root / "test").rename(root / "elsewhere")
    touch(root, "val/ILSVRC2012_val_00000001.JPEG")
    assert refusal(root) == f"{str(root / 'val')!r} has no class folders, and it needs one for each class"


def test_tiny_imagenet(tiny):
    found = listing.find(tiny)
    assert found.names == ["n01443537", "n01629819", "n02012849"] and found.held_out == "val"
    assert of(found, "train")["n01629819"] == [f"train/n01629819/images/n01629819_{i}.JPEG" for i in range(3)]
    assert of(found, "val") == {
        name: [f"val/images/val_{i}.JPEG", f"val/images/val_{i + 3}.JPEG"] for i, name in enumerate(found.names)
    }
    assert found.notes == [
        "Tiny-ImageNet: the test part is val, with the classes of val_annotations.txt; test has none, and is not used."
    ]
    assert [found.title(name) for name in found.names] == found.names


def test_tiny_imagenet_whose_val_was_sorted_into_folders(tiny):
    for file, name in (("val_0.JPEG", "n01443537"), ("val_1.JPEG", "n01629819"), ("val_2.JPEG", "n02012849")):
        touch(tiny, f"val/{name}/images/{file}")
    found = listing.find(tiny)
    assert of(found, "val") == {name: [f"val/{name}/images/val_{i}.JPEG"] for i, name in enumerate(found.names)}
    (tiny / "val" / "val_annotations.txt").unlink()
    assert of(listing.find(tiny), "val") == of(found, "val")


def test_tiny_imagenet_without_annotations(tiny):
    (tiny / "val" / "val_annotations.txt").unlink()
    text = refusal(tiny)
    assert f"{str(tiny / 'val' / 'val_annotations.txt')!r} is not there, and Tiny-ImageNet has the classes" in text
    os.mkfifo(tiny / "val" / "val_annotations.txt")
    assert "val_annotations.txt' cannot be read: is not a regular file" in refusal(tiny)


def test_words_give_names_and_equal_ones_keep_the_folder(tiny):
    words = "n00000001\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tcrane\nn02012849\tcrane\n"
    written(tiny / "words.txt", words.encode() + b"n99999999\tcaf\xe9\n")
    found = listing.find(tiny)
    titles = [found.title(name) for name in found.names]
    assert titles == ["goldfish", "crane (n01629819)", "crane (n02012849)"]
    assert found.notes[-1] == "Classes are called by words.txt: goldfish, crane (n01629819), crane (n02012849), ..."
    written(tiny / "words.txt", "n01629819\tsalamander\n")
    assert [listing.find(tiny).title(name) for name in found.names] == ["n01443537", "salamander", "n02012849"]


def test_annotations_with_missing_files_and_unknown_classes(tiny):
    path = tiny / "val" / "val_annotations.txt"
    whole = path.read_text()
    path.write_text(whole + "val_99.JPEG\tn01443537\t0\t0\t1\t1\n")
    text = refusal(tiny)
    assert text.startswith(
        f"{str(path)!r} line 7 names 'val_99.JPEG', which is not in {str(tiny / 'val' / 'images')!r}; --data.skip"
    )
    path.write_text(whole.replace("val_3.JPEG\tn01443537", "val_3.JPEG\tn01443538"))
    assert "line 4: 'val_3.JPEG' is of class 'n01443538', which has no folder in train; did you mean 'n01443537'?" in refusal(
        tiny
    )
    (tiny / "val" / "images" / "val_5.JPEG").unlink()
    touch(tiny, "val/images/more.JPEG")
    found = listing.find(tiny, skip_broken=True)
    assert found.notes[1:] == [
        "Ignored 1 line of val_annotations.txt with a class that train lacks: 'line 4 (n01443538)'.",
        "Ignored 1 line of val_annotations.txt with a file that is not there: 'line 6 (val_5.JPEG)'.",
        "Left out 1 file of val that val_annotations.txt lacks: 'more.JPEG'.",
    ]
    assert of(found, "val")["n01443537"] == ["val/images/val_0.JPEG"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: lines[1:], "lacks 1 file ('val_0.JPEG') of"),
        (lambda lines: [*lines, lines[2]], "line 7 names 'val_2.JPEG' again, after line 3"),
        (lambda lines: ["no tab", *lines], "line 1 is 'no tab', and must be a file and its class with a tab between them"),
        (lambda lines: ["../secret.jpg\tn01443537", *lines], "line 1 names '../secret.jpg', which is not in"),
    ],
)
def test_annotations_that_do_not_match(tiny, change, text):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    assert f"{str(path)!r} {text}" in refusal(tiny)


def test_class_of_tiny_imagenet_without_a_validation_image(tiny):
    path = tiny / "val" / "val_annotations.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "n01629819" not in line))
    for file in ("val_1.JPEG", "val_4.JPEG"):
        (tiny / "val" / "images" / file).unlink()
    assert f"class 'n01629819' is empty: no jpg, jpeg or png file in {str(path)!r}" in refusal(tiny)
    found = listing.find(tiny, skip_broken=True)
    assert found.empty == ["n01629819"] and found.names == ["n01443537", "n02012849"]


# A list of classes


def test_classes_in_the_order_of_the_list(root, tmp_path):
    path = written(tmp_path / "some.txt", b"\xef\xbb\xbf# two of three\r\n\r\ncat/   # a comment\r\n  ant\r\n")
    found = listing.find(root, classes=path)
    assert found.names == ["cat", "ant"]
    assert of(found, "train") == {name: [f"train/{name}/{i}.jpg" for i in range(3)] for name in ("cat", "ant")}
    assert found.files("test")[1].tolist() == [0, 0, 1, 1]


def test_classes_outside_of_the_list_may_be_anything(root, tmp_path):
    (root / "train" / "dog").mkdir()
    (root / "test" / "emu").symlink_to("nowhere")
    path = written(tmp_path / "some.txt", "bee\nant\n")
    assert listing.find(root, classes=path).names == ["bee", "ant"]
    text = refusal(root, classes=written(path, "ant\ndog\n"))
    assert "class 'dog' is in train but not in test" in text
    # A list of all that train has is a list as well.
    (root / "train" / "dog").rmdir()
    assert listing.find(root, classes=written(path, "ant\nbee\ncat\n")).names == ["ant", "bee", "cat"]
    assert "class 'emu' is in test but not in train" in refusal(root)


def test_names_with_a_hash_a_space_and_bytes_that_are_not_utf8(root, tmp_path):
    for name in (b"c #", b"#1", b"caf\xe9"):
        for part in (b"train", b"test"):
            os.makedirs(os.path.join(os.fsencode(root), part, name))
            with open(os.path.join(os.fsencode(root), part, name, b"\xff 1.jpg"), "wb"):
                pass
    found = listing.find(root, classes=written(tmp_path / "some.txt", b"c #\n#1\ncaf\xe9 # coffee\n#2\n"))
    assert [found.title(name) for name in found.names] == ["c #", "#1", "caf\\udce9"]
    assert all(os.path.exists(path) for path in found.files("train")[0])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ant\n\n# bees\nbeee\n", "line 4: class 'beee' has no folder in"),
        ("ant\nbe\n", "; did you mean 'bee'?"),
        ("ant\nbee\nant\n", "line 3: class 'ant' is listed already, in line 1"),
        ("# none\n", "lists 0 classes, and at least 2 are needed"),
        ("ant\n", "lists 1 class, and at least 2 are needed"),
        ("../train/ant\nbee", "line 1: class '../train/ant' has no folder in"),
    ],
)
def test_class_list_that_does_not_match(root, tmp_path, content, text):
    path = written(tmp_path / "some.txt", content)
    found = refusal(root, classes=path)
    assert found.startswith(repr(str(path))) and text in found


def test_lists_in_another_encoding(root, tmp_path):
    path = written(tmp_path / "some.txt", "ant\nbee\n".encode("utf-16"))
    assert refusal(root, classes=path) == refusal(root, labels=path) == f"{str(path)!r} is not UTF-8 text, and must be"
    written(path, "ant\nbé\n".encode("latin-1"))
    assert refusal(root, classes=path).endswith("; the line is not UTF-8 text")


def test_class_list_that_cannot_be_read(root, tmp_path):
    assert f"{str(tmp_path / 'no.txt')!r} cannot be read: No such file or directory" in refusal(root, classes=tmp_path / "no.txt")
    assert "cannot be read: is a folder, not a file" in refusal(root, classes=tmp_path)


# A list of labels


def rows(root, header="file,class\n"):
    lines = [
        f"{part}/{name}/{i}.jpg,{name}"
        for part, n in (("train", 3), ("test", 2))
        for name in ("ant", "bee", "cat")
        for i in range(n)
    ]
    return header + "\n".join(lines) + "\n"


@pytest.mark.parametrize("header", ["", "file,class\n", "\ufefffilename,label\r\n"])
def test_labels_that_match(root, tmp_path, header):
    found = listing.find(root, labels=written(tmp_path / "labels.csv", rows(root, header)))
    assert found.notes == [] and len(found.files("train")[0]) == 9


def test_mislabelled_files_are_named_with_both_classes(root, tmp_path):
    path = tmp_path / "labels.csv"
    written(
        path,
        rows(root).replace("train/ant/1.jpg,ant", "train/ant/1.jpg,cat").replace("test/bee/0.jpg,bee", '"./test//bee/0.jpg",ant'),
    )
    text = refusal(root, labels=path)
    assert text == (
        f"{str(path)!r} does not match {str(root)!r}: 2 files mislabelled ('train/ant/1.jpg' lies in 'ant' and line 3 says 'cat'; "
        "'test/bee/0.jpg' lies in 'bee' and line 13 says 'ant'); --data.skip-broken leaves such files out"
    )
    found = listing.find(root, labels=path, skip_broken=True)
    assert of(found, "train")["ant"] == ["train/ant/0.jpg", "train/ant/2.jpg"] and of(found, "test")["bee"] == ["test/bee/1.jpg"]
    assert len(found.notes) == 1 and found.notes[0].startswith("Left out what does not match 'labels.csv': 2 files mislabelled (")
    written(path, rows(root).replace(",ant", ",bee"))
    assert "5 files mislabelled" in refusal(root, labels=path) and "and 2 more)" in refusal(root, labels=path)


def test_files_that_one_of_folder_and_list_lacks(root, tmp_path):
    path = written(tmp_path / "labels.csv", rows(root).replace("train/ant/1.jpg", "train/ant/7.jpg"))
    text = refusal(root, labels=path)
    assert "1 file listed but not among the images ('train/ant/7.jpg of line 3')" in text
    assert "1 image not listed ('train/ant/1.jpg')" in text
    found = listing.find(root, labels=path, skip_broken=True)
    assert of(found, "train")["ant"] == ["train/ant/0.jpg", "train/ant/2.jpg"]


def test_labels_of_one_part_alone(root, tmp_path):
    path = written(tmp_path / "train.csv", "".join(line for line in rows(root).splitlines(True) if not line.startswith("test")))
    found = listing.find(root, labels=path)
    assert found.notes == ["'train.csv' names no file of test, which was not checked."] and len(found.files("test")[0]) == 6


def test_labels_of_all_classes_with_some_of_them_used(root, tmp_path):
    labels, classes = written(tmp_path / "labels.csv", rows(root)), written(tmp_path / "some.txt", "ant\ncat\n")
    assert listing.find(root, labels=labels, classes=classes).notes == []
    # A file of a class that is used, in the folder of one that is not, and the other way round.
    changed = (
        rows(root).replace("train/bee/1.jpg,bee", "train/bee/1.jpg,ant").replace("train/cat/0.jpg,cat", "train/cat/0.jpg,bee")
    )
    text = refusal(root, labels=written(labels, changed), classes=classes)
    assert "1 file mislabelled ('train/cat/0.jpg' lies in 'cat' and line 8 says 'bee')" in text
    assert "1 file listed but not among the images ('train/bee/1.jpg of line 6')" in text


def test_labels_of_tiny_imagenet_are_compared_with_the_annotations(tiny, tmp_path):
    path = written(tmp_path / "labels.csv", "".join(f"val/images/val_{i}.JPEG,{name}\n" for i, name in enumerate(
        ["n01443537", "n01629819", "n02012849", "n01443537", "n01629819", "n01443537"])))  # fmt: skip
    assert "'val/images/val_5.JPEG' lies in 'n02012849' and line 6 says 'n01443537'" in refusal(tiny, labels=path)


def test_class_that_loses_all_its_files_to_the_list(root, tmp_path):
    path = written(tmp_path / "labels.csv", "".join(line for line in rows(root).splitlines(True) if "test/bee" not in line))
    found = listing.find(root, labels=path, skip_broken=True)
    assert found.names == ["ant", "cat"] and found.empty == ["bee"]
    written(path, "train/ant/0.jpg,ant\n")
    assert f"once what does not match {str(path)!r} is left out, and at least 2" in refusal(root, labels=path, skip_broken=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("file,class\ntrain/ant/0.jpg\n", "line 2 has 1 field, and must be file,class, separated by a comma"),
        ("train/ant/0.jpg;ant\n", "line 1 has 1 field, and must be file,class, separated by a comma"),
        ("train/ant/0.jpg,ant,0\n", "line 1 has 3 fields, and must be file,class"),
        ('"train/ant/0.jpg,ant\n', "line 1 cannot be read as CSV"),
        ("train/ant/0.jpg,antt\n", "line 1: class 'antt' has no folder in train; did you mean 'ant'?"),
        ("train/ant/0.jpg,ant\ntrain//ant/0.jpg,bee\n", "line 2 names 'train/ant/0.jpg' again, after line 1"),
        ("ant/0.jpg,ant\n", "names no file of train or test, and must name them from"),
        ("", "names no file of train or test"),
    ],
)
def test_label_list_that_is_none(root, tmp_path, content, text):
    path = written(tmp_path / "labels.csv", content)
    found = refusal(root, labels=path)
    assert found.startswith(repr(str(path))) and text in found


def test_relative_root(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    path = written(tmp_path / "labels.csv", rows(root).replace("train/ant/1.jpg,ant", "train/ant/1.jpg,cat"))
    found = listing.find(type(root)("."), labels=path, skip_broken=True)
    assert "1 file mislabelled ('train/ant/1.jpg' lies in 'ant' and line 3 says 'cat')" in found.notes[0]
    assert of(found, "train")["ant"] == ["train/ant/0.jpg", "train/ant/2.jpg"]


# Links


def test_links_in_circles_and_to_nowhere(root):
    (root / "train" / "ant" / "up").symlink_to("..")
    (root / "train" / "ant" / "self.jpg").symlink_to("self.jpg")  # told when its turn comes
    for part in ("train", "test"):
        (root / part / "a circle").symlink_to("a circle")
        (root / part / "nowhere").symlink_to(root / "missing")
    assert "class 'a circle' is empty" in refusal(root)
    found = listing.find(root, skip_broken=True)
    assert found.empty == ["a circle", "nowhere"] and len(of(found, "train")["ant"]) == 4


def test_what_was_listed_is_what_is_read(tiny, tmp_path):
    """The whole way, with real images: the labels follow the list and the names are those of words.txt."""
    written(tiny / "words.txt", "n01443537\tgoldfish\nn02012849\tcrane, bird\n")
    for path in tiny.rglob("*.JPEG"):
        level = int(path.stem.rpartition("_")[2]) * 10
        Image.new("RGB", (8, 8), (level, level, level)).save(path)
    classes = written(tmp_path / "some.txt", "n02012849\nn01443537\n")
    arrays = folder.read(tiny, classes=classes)
    assert arrays.class_names == ("crane", "goldfish") and arrays.test_labels.tolist() == [0, 0, 1, 1]
    assert arrays.test_images[:, 0, 0, 0].tolist() == [20, 50, 0, 30]
