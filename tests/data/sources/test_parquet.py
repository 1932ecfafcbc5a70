"""Which columns of a table are taken, and what is said of those that do not fit; bad arrays."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erw.data.sources.tables import Table
from erw.errors import DataError
from helpers.parts import picture

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
IMAGE = {"_type": "Image"}


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


def classes(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def write(path: Path, columns: dict[str, Any], **features: dict[str, Any]) -> Path:
    """A Parquet file with the metadata that `datasets` writes of its features."""
    from pyarrow import parquet

    told = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(told), path)
    return path


def labels(table: Table) -> list[int]:
    return [table[i][1] for i in range(len(table))]


def test_columns_of_other_names_are_found_by_their_features(tmp_path: Path) -> None:
    cells, ab = [png(0), png(1)], classes("a", "b")
    columns = {"no": [5, 6], "photo": cells, "class": [1, 0], "kind": [0, 1]}
    one = Table([write(tmp_path / "ONE.PARQUET", columns, **{"photo": IMAGE, "class": ab})])
    assert one.class_names == ("a", "b") and labels(one) == [1, 0]
    assert np.array_equal(one[1][0], picture(1))

    features = {"photo": IMAGE, "class": ab, "kind": ab}
    several = write(tmp_path / "several.parquet", columns, **features)
    with pytest.raises(DataError, match=r"several ClassLabel columns \(class, kind\).*--columns"):
        Table([several])
    assert labels(Table([several], columns=("photo", "kind"))) == [0, 1]
    assert labels(Table([several], labelled=False)) == [0, 0]

    usual = write(tmp_path / "usual.parquet", columns | {"label": [1, 1]}, **features, label=ab)
    assert labels(Table([usual])) == [1, 1]


@pytest.mark.parametrize("encoded", [False, True], ids=["plain", "dictionary"])
def test_texts_are_looked_up_in_the_list_of_names(tmp_path: Path, encoded: bool) -> None:
    text = pyarrow.array(["dog", "cat"])
    columns = {
        "image": [png(0), png(1)],
        "label": text.dictionary_encode() if encoded else text,
    }
    names = classes("dog", "cat", "fox")
    table = Table([write(tmp_path / "x.parquet", columns, label=names)])
    assert table.class_names == ("dog", "cat", "fox") and labels(table) == [0, 1]
    with pytest.raises(DataError, match=r"label 'dog', expected .* one of cat, fox"):
        Table([write(tmp_path / "x.parquet", columns, label=classes("cat", "fox"))])


@pytest.mark.parametrize("name", ["class", "category", "target", "coarse_label"])
def test_labels_by_other_names_are_taken_where_there_is_one(tmp_path: Path, name: str) -> None:
    columns = {"image": [png(0), png(1)], name: [1, 0]}
    assert labels(Table([write(tmp_path / "x.parquet", columns)])) == [1, 0]


def test_files_with_other_class_names_are_refused(tmp_path: Path) -> None:
    columns = {"image": [png(0)], "label": [0]}
    first = write(tmp_path / "0.parquet", columns, label=classes("a", "b", "c"))
    same = write(tmp_path / "1.parquet", columns, label=classes("a", "b", "c"))
    other = write(tmp_path / "2.parquet", columns, label=classes("c", "b", "a"))
    assert Table([first, same]).class_names == ("a", "b", "c")
    with pytest.raises(
        DataError, match=r"2.parquet has .*'c', 'b', 'a'.*0.parquet .*'a', 'b', 'c'"
    ):
        Table([first, same, other])
    assert len(Table([first, other], labelled=False)) == 2
    bare = write(tmp_path / "3.parquet", {"image": [png(0)]})
    with pytest.raises(DataError, match=r"3\.parquet has \('image', None, .*'image', 'label'"):
        Table([first, bare])


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "0.png").write_bytes(png(0))
    monkeypatch.chdir(tmp_path)
    for cell in ("images/0.png", str(tmp_path / "set" / "images" / "0.png")):
        for value in (cell, {"bytes": None, "path": cell}):
            table = Table([write(tmp_path / "set" / "x.parquet", {"image": [value]})])
            assert np.array_equal(table[0][0], picture(0))


@pytest.mark.parametrize("cell", [7, [b"x"], {"pixels": b"x"}], ids=["int", "list", "struct"])
def test_an_image_column_of_another_type_is_named(tmp_path: Path, cell: Any) -> None:
    path = write(tmp_path / "x.parquet", {"image": [cell]})
    with pytest.raises(DataError, match=r"image column image has type .*expected bytes.*--columns"):
        Table([path])


@pytest.mark.parametrize("label", [True, 1.0, [1]])
def test_a_label_column_of_another_type_is_named(tmp_path: Path, label: Any) -> None:
    path = write(tmp_path / "x.parquet", {"image": [png(0)], "label": [label]})
    with pytest.raises(DataError, match=r"column label: label \[?(True|1).*--classes none"):
        Table([path])
    assert Table([path], labelled=False).class_names == ()


def test_a_column_of_categories_is_text(tmp_path: Path) -> None:
    column = pyarrow.array(["b", "a"]).dictionary_encode()
    table = Table([write(tmp_path / "x.parquet", {"image": [png(0), png(1)], "label": column})])
    assert table.class_names == ("a", "b") and labels(table) == [1, 0]


def test_columns_that_may_be_labels_and_are_not_used_are_named(tmp_path: Path) -> None:
    """Of several likely names none is taken; one alone is."""
    columns = {"image": [png(1), png(2)], "class": [0, 1], "category": [1, 0], "width": [4, 4]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    source = Table([tmp_path / "a.parquet"])
    assert source.class_names == ()
    (note,) = source.notes
    assert "class, category, width are not used" in note and "--columns image NAME" in note
    named = Table([tmp_path / "a.parquet"], columns=["image", "category"])
    assert named.labels.tolist() == [1, 0] and not named.notes
    pyarrow.parquet.write_table(pyarrow.table(columns).drop(["class"]), tmp_path / "b.parquet")
    assert Table([tmp_path / "b.parquet"]).labels.tolist() == [1, 0]
