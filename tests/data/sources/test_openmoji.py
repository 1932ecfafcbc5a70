"""The built-in images: pure functions of (seed, split, index), with held-out glyphs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erw.data.sources import openmoji
from erw.data.sources.openmoji import OpenMojiSet, groups, split_glyphs
from erw.errors import DataError


def test_table_holds_1914_glyphs_in_9_groups() -> None:
    assert len(groups()) == 9
    codes = [code for group in groups().values() for code in group]
    assert len(codes) == len(set(codes)) == 1914
    assert "1F600" in groups()["smileys-emotion"]
    assert "1F40C" in groups()["animals-nature"]


def test_splits_share_no_glyph_and_leave_none_out() -> None:
    train, test = split_glyphs("train"), split_glyphs("test")
    for name, codes in groups().items():
        assert not set(train[name]) & set(test[name])
        assert set(train[name]) | set(test[name]) == set(codes)
        assert len(test[name]) == round(0.1 * len(codes))


def test_image_is_a_function_of_seed_split_and_index() -> None:
    one, longer = OpenMojiSet("train", count=50, seed=3), OpenMojiSet("train", count=5000, seed=3)
    for index in (0, 49, 7):  # any order, any count
        image, label = one[index]
        again, label_again = longer[index]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert label == label_again == index % 9
        np.testing.assert_array_equal(image, again)
    assert not np.array_equal(one[0][0], OpenMojiSet("train", seed=4)[0][0])
    assert not np.array_equal(one[0][0], OpenMojiSet("test", seed=3)[0][0])


def test_compositions_use_only_their_split_and_vary() -> None:
    for split in ("train", "test"):
        source = OpenMojiSet(split, count=2000)
        made = [source.composition(i) for i in range(900)]
        glyphs = list(split_glyphs(split).values())
        assert all(how.hexcode in glyphs[how.label] for how in made)
        assert len({how.background for how in made}) > 800
        assert 0.7 <= min(how.scale for how in made) < max(how.scale for how in made) <= 1.1
        flips = [how.flip for how in made if source.class_names[how.label] == "objects"]
        assert 0.3 < np.mean(flips) < 0.7
        assert not any(how.flip for how in made if source.class_names[how.label] == "flags")


def test_composition_does_not_change_between_releases() -> None:
    how = OpenMojiSet("train").composition(12)
    assert (how.hexcode, how.label, how.background) == ("1F96E", 3, (234, 178, 229))


def test_background_shows_in_the_corner_and_glyph_in_the_middle() -> None:
    source = OpenMojiSet("train")
    for index in range(0, 90, 10):
        image, _ = source[index]
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == source.composition(index).background).all(1).any()
        assert image.std() > 5


@pytest.mark.parametrize("size", [32, 48, 64])
def test_other_sizes_show_the_same_picture(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = OpenMojiSet("train")[5]
    other = OpenMojiSet("train", size=size)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where its one glyph is drawn, not all
    monkeypatch.setattr(openmoji, "groups", lambda: {"one": [other.composition(5).hexcode]})
    image, _ = other[5]
    assert image.shape == (size, size, 3)
    assert abs(image.mean() - reference.mean()) < 2


def test_fingerprint_follows_what_changes_the_images() -> None:
    made = {
        OpenMojiSet("train", count=10).fingerprint(),
        OpenMojiSet("train", count=11).fingerprint(),
        OpenMojiSet("train", count=10, seed=1).fingerprint(),
        OpenMojiSet("test", count=10).fingerprint(),
        OpenMojiSet("train", count=10, size=32).fingerprint(),
    }
    assert len(made) == 5
    assert OpenMojiSet("train", count=10).fingerprint() in made


def test_damaged_raster_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = {"objects": groups()["objects"][:3]}
    monkeypatch.setattr(openmoji, "groups", lambda: few)
    first = openmoji.Rasters(32)
    (file,) = (tmp_path / "erw").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = openmoji.Rasters(32)
    assert file.read_bytes()[:2] == b"PK"
    third = openmoji.Rasters(32)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255  # within a glyph: the list of them is at the end
    file.write_bytes(flipped)
    fourth = openmoji.Rasters(32)
    for code in few["objects"]:
        assert first[code].shape == (32, 32, 4) and first[code].any()
        for other in (second, third, fourth):
            np.testing.assert_array_equal(first[code], other[code])
    assert [path.name for path in (tmp_path / "erw").iterdir()] == [file.name]  # no left-overs


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"split": "valid"}, "choose train or test"),
        ({"size": 4}, "of 8 to 512"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        OpenMojiSet(**settings)


def test_index_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        OpenMojiSet("train", count=5)[5]


def test_some_groups_alone() -> None:
    two = OpenMojiSet("train", size=16, count=4, groups=("flags", "smileys-emotion"))
    assert two.class_names == ("smileys-emotion", "flags")  # the table's order, not the request's
    glyphs = split_glyphs("train")
    for index in range(4):
        how = two.composition(index)
        assert how.label == index % 2 and how.hexcode in glyphs[two.class_names[how.label]]
    others = OpenMojiSet("train", size=16, count=4, groups=("flags", "objects"))
    everything = OpenMojiSet("train", size=16, count=4)
    assert len({s.fingerprint() for s in (two, others, everything)}) == 3
    named = OpenMojiSet("train", size=16, count=4, groups=tuple(groups()))
    assert named.fingerprint() == everything.fingerprint()
    with pytest.raises(DataError, match="no group 'dogs' of built-in images; smileys-emotion"):
        OpenMojiSet("train", groups=("dogs",))
