"""Labels: which of the places that may hold them counts, and what does not go together."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from erw.data import open_source
from erw.data.sources import overview
from erw.data.sources.labels import classes
from erw.errors import DataError
from helpers.archives import png, shades, tar
from helpers.parts import make, picture


@pytest.mark.parametrize("as_dict", [False, True])
def test_edm2_table_of_labels(tmp_path: Path, as_dict: bool) -> None:
    (tmp_path / "00000").mkdir()
    rows = []
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / "00000" / f"img{i:08d}.png")
        rows.append([f"00000/img{i:08d}.png", (3 - i) % 3])
    table = {"labels": dict(rows) if as_dict else rows}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [0, 2, 1, 0] and source.class_names == ("0", "1", "2")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_source(tmp_path).class_names == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "not readable as JSON"),
        ('{"labels": [["a.png", 1]]}', "no label for b.png"),
        ('{"labels": [["a.png", [0, 1]], ["b.png", 0]]}', "expected a class number"),
        ('{"labels": [["a.png", -1], ["b.png", 0]]}', "expected a class number"),
        ('{"labels": [1, 2]}', "a list of"),
        ('{"labels": {"a.png": 1000000000000, "b.png": 0}}', "label 1,000,000,000,000 is of no"),
        ('{"labels": []}', 'expected "labels": null or'),
        ("[" * 100_000, "not readable as JSON"),
        (
            '{"labels": {"a.png": 5, "b.png": 0}, "class_names": ["x"]}',
            "label 5, expected .* one of x",
        ),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, table: str, message: str) -> None:
    for name in "ab":
        Image.fromarray(picture(0)).save(tmp_path / f"{name}.png")
    (tmp_path / "dataset.json").write_text(table)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def classes_of(root: Path, *names: str) -> Path:
    """A folder with one image in each of these class folders."""
    for shade, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(png(shade))
    return root


def test_a_table_without_labels_leaves_the_folders_their_classes(tmp_path: Path) -> None:
    classes_of(tmp_path, "cat", "dog")
    (tmp_path / "dataset.json").write_text('{"name": "pets", "licenses": []}')
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    said = 'json names no labels and is left alone: it has name, licenses, expected "labels"'
    assert said in overview(source)[1]
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_source(tmp_path).class_names == ()


def test_label_files_count_in_a_folder_too(tmp_path: Path) -> None:
    for name, label in (("0", b"1"), ("1", b"0")):
        (tmp_path / f"{name}.png").write_bytes(png(int(name)))
        (tmp_path / f"{name}.cls").write_bytes(label)
    source = open_source(tmp_path)
    assert shades(source) == [(0, 1), (1, 0)] and len(overview(source)) == 1
    assert open_source(tmp_path, classes="none").class_names == ()


def test_an_image_that_a_table_names_twice(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    table = tmp_path / "dataset.json"
    table.write_text('{"labels": [["a.png", 1], ["a.png", 1]]}')
    assert open_source(tmp_path)[0][1] == 1
    table.write_text('{"labels": [["a.png", 1], ["a.png", 2]]}')
    with pytest.raises(DataError, match=r"gives a\.png two labels: 1 and 2"):
        open_source(tmp_path)


def test_folders_of_splits_are_named(tmp_path: Path) -> None:
    classes_of(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    both = open_source(tmp_path)
    assert both.class_names == ("test", "train") and "look like splits" in overview(both)[1]
    one = open_source(tmp_path / "train")
    assert one.class_names == ("cat", "dog") and shades(one) == [(0, 0), (1, 1)]


SPLIT = ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/eel/3.png", "other/4.png")


def kept_in(kind: str, root: Path, names: Sequence[str], **more: bytes) -> Path:
    """Images of the shades 0, 1, ... by these names, and other files, in a folder or an archive."""
    members = {name: png(shade) for shade, name in enumerate(names)}
    members |= {name.replace("_", "."): data for name, data in more.items()}
    root.mkdir(parents=True, exist_ok=True)
    if kind == "tar":
        return tar(root / "set.tar", members)
    if kind == "zip":
        with zipfile.ZipFile(root / "set.zip", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return root / "set.zip"
    for name, data in members.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(data)
    return root / "set"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_one_of_the_splits_in_folders(tmp_path: Path, kind: str) -> None:
    where = kept_in(kind, tmp_path, SPLIT)
    train, val = (open_source(where, split=split) for split in ("train", "validation"))
    assert train.class_names == ("cat", "dog") and shades(train) == [(0, 0), (1, 1)]
    assert val.class_names == ("cat", "eel") and shades(val) == [(2, 0), (3, 1)]
    assert train.name == f"{where.name}:train" and len(overview(train)) == 1
    assert open_source(where, split="train", classes="leaf").class_names == ("cat", "dog")
    with pytest.raises(DataError, match="has no split test, its folders: train, val"):
        open_source(where, split="test")
    with pytest.raises(DataError, match="has no splits or subsets inside"):
        open_source(where, subset="cat")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_splits_within_classes_flat_ones_and_tables_beside_them(tmp_path: Path, kind: str) -> None:
    names = ["cat/Train/0.png", "cat/test/1.png", "dog/Train/2.png", "test/Train/3.png"]
    inner = open_source(kept_in(kind, tmp_path / "a", names), split="train")
    assert inner.class_names == ("cat", "dog") and shades(inner) == [(0, 0), (2, 1)]
    flat = open_source(
        kept_in(kind, tmp_path / "b", ["x/train/0.png", "x/eval/1.png"]), split="eval"
    )
    assert flat.class_names == () and shades(flat) == [(1, 0)]
    rows = b"file_name,label\ntrain/0.png,dog\ntest/1.png,cat\neval/2.png,cat\n"
    where = kept_in(
        kind, tmp_path / "c", ["train/0.png", "test/1.png", "eval/2.png"], metadata_csv=rows
    )
    for split, shade, names_ in (
        ("train", 0, ("dog",)),
        ("test", 1, ("cat",)),
        ("eval", 2, ("cat",)),
    ):
        source = open_source(where, split=split)
        assert source.class_names == names_ and shades(source) == [(shade, 0)]
    with pytest.raises(DataError, match="no split testing, its folders: eval, test, train"):
        open_source(where, split="testing")  # which could be either


def test_two_classes_of_one_name_stay_two(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
    table = {
        "labels": {"a.png": 0, "b.png": 1, "c.png": 2},
        "class_names": ["crane", "owl", "crane"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert open_source(tmp_path).class_names == ("crane #0", "owl", "crane #2")
    cache = make(tmp_path, tmp_path / "cache", "none", image_size=8)
    assert cache.class_names == ("crane #0", "owl", "crane #2")
    assert cache.read(range(3)).labels.tolist() == [0, 1, 2]
    table["labels"] = {"a.png": "crane", "b.png": "owl", "c.png": "owl"}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"label 'crane', .* one of crane #0, owl, crane #2"):
        open_source(tmp_path)


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(0))
    (tmp_path / "dataset.json").write_text('{"labels": {"a.png": 1, "b.png": 3}}')
    line, empty = overview(open_source(tmp_path))
    assert line.endswith("4 classes (0, 1, 2, 3) of 0 to 1 images")
    assert empty == "classes without images: 2 (0, 2)"


def test_keys_of_json_beside_images_that_are_no_labels_are_named(tmp_path: Path) -> None:
    members = {f"{i}.json": b'{"species": 1, "caption": "x"}' for i in range(2)}
    path = tar(tmp_path / "a.tar", members | {f"{i}.png": png(i) for i in range(2)})
    source = open_source(path)
    assert source.class_names == ()
    said = (
        'a.tar!1.json names no labels and is left alone: it has species, caption, expected "labels"'
    )
    assert said in overview(source)[1]
    assert "species" not in "".join(overview(open_source(path, classes="none")))


def test_two_spellings_of_one_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    classes_of(tmp_path, f"a/{composed}", f"b/{decomposed}")
    assert open_source(tmp_path / "b").class_names == ()
    members = {f"{composed}/0.png": png(1), f"{decomposed}/1.png": png(2), "tea/0.png": png(3)}
    source = open_source(tar(tmp_path / "x.tar", members))
    assert source.class_names == (composed, "tea")
    assert sorted(shades(source)) == [(1, 0), (2, 0), (3, 1)]
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / f"{decomposed}.png").write_bytes(png(1))
    (flat / "dataset.json").write_text(json.dumps({"labels": {f"{composed}.png": 1}}))
    assert open_source(flat)[0][1] == 1


def test_a_wrapper_around_a_flat_set_is_no_class(tmp_path: Path) -> None:
    classes_of(tmp_path, "photos", "@eaDir", "lost+found", "$Recycle.Bin", "@Recycle", "#snapshot")
    source = open_source(tmp_path)
    assert source.class_names == () and len(source) == 1
    assert overview(source)[0].endswith("no classes: the set is unconditional")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_tables_have_labels_by_file_name(tmp_path: Path, name: str) -> None:
    """Of a folder inside too, in any order, captions beside them; other columns are no labels."""
    rows = [("1.png", "cat", "a, b"), ("0.png", "dog", "c")]
    for i in range(2):
        (tmp_path / "inner" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "inner" / "deep" / f"{i}.png").write_bytes(png(i))
    if name.endswith("csv"):
        text = "file_name,label,text\n" + "".join(f'deep/{f},{x},"{t}"\n' for f, x, t in rows)
    else:
        keys = ("file_name", "label", "text")
        lines = [dict(zip(keys, (f"deep/{f}", x, t), strict=True)) for f, x, t in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "inner" / name).write_text(text)
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog") and shades(source) == [(0, 1), (1, 0)]
    (tmp_path / "inner" / name).write_text(text.replace("label", "caption"))
    source = open_source(tmp_path)
    assert source.class_names == ()
    assert any(
        f"{name} names no labels" in note and "caption, text" in note for note in source.notes
    )


@pytest.mark.parametrize(
    "name", ["labels.csv", "image_class_labels.txt", "train.tsv", "y/Labels.npy"]
)
def test_a_file_that_might_hold_labels_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("a.png,x\n")
    notes = open_source(tmp_path).notes
    assert (
        f"{name} might hold labels and is not used: labels are read from metadata.csv" in notes[1]
    )
    assert len(open_source(tmp_path, classes="none").notes) == 1
    classes_of(tmp_path / "set", "cat", "dog")
    (tmp_path / "set" / "labels.csv").write_text("x")
    assert len(open_source(tmp_path / "set").notes) == 1  # which has its labels


def test_labels_of_images_that_are_not_there_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\nc.png,x\n")
    source = open_source(tmp_path)
    assert source.class_names == ("x",)
    assert source.notes == [
        f"2 labels of {tmp_path}/metadata.csv are of no image here (b.png, c.png)"
    ]


def test_numbers_in_a_metadata_csv_are_class_numbers(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,10\n1.png,2\n2.png,10\n")
    assert [label for _, label in shades(open_source(tmp_path))] == [10, 2, 10]
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png, 10\n1.png,-1\n2.png,3\n")
    with pytest.raises(DataError, match="label -1, expected a class number from 0"):
        open_source(tmp_path)


def test_one_image_and_one_label_of_a_sample_are_a_pair(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {
        "0.input.png": png(1), "0.output.cls": b"1", "1.input.png": png(2), "1.output.cls": b"0",
    })  # fmt: skip
    assert shades(open_source(tmp_path / "a.tar")) == [(1, 1), (2, 0)]


@pytest.mark.parametrize("link", ["a", "c/a"])
def test_real_folders_count_before_links_to_them(tmp_path: Path, link: str) -> None:
    """The class is named by the folder itself, whatever comes first in order or on the disk."""
    for shade, name in enumerate(("b", "c", "z")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_bytes(png(shade))
    (tmp_path / "set" / link).symlink_to(tmp_path / "set" / "z", target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert source.class_names == ("b", "c", "z") and shades(source) == [(0, 0), (1, 1), (2, 2)]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").write_bytes(png(9))
    (tmp_path / "set" / "d").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert open_source(tmp_path / "set").class_names == ("b", "c", "d", "z")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\n0.png,cat\n1.png,\n2.png, \n"),
        ("metadata.csv", "file_name,label\n0.png,4\n1.png,\n2.png\n"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": "cat"}\n{"file_name": "1.png"}\n'),
        ("dataset.json", '{"labels": {"0.png": "cat", "1.png": "", "2.png": null}}'),
    ],
)
def test_an_empty_cell_is_no_class(tmp_path: Path, name: str, text: str) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / name).write_text(text)
    said = rf"{name} has no label for 1\.png, 2\.png \(2 of 3\): fill them in, or .* none"
    with pytest.raises(DataError, match=said):
        open_source(tmp_path)
    assert open_source(tmp_path, classes="none").class_names == ()
    with pytest.raises(DataError, match="2 of 3 images have no label"):
        classes(["cat", "", " "], source="a table")
    assert classes(["", " "], source="a table")[0] == ()
