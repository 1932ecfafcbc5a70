"""Images on disk: interrupted runs go on, ranks share the seeds, other settings are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from erw.errors import DataError, ErwError
from erw.evaluation.images import opened
from erw.sampling.generation import Generation, generate
from erw.sampling.save import read_images, read_settings, write
from helpers.archives import png
from helpers.forked import both
from helpers.hostile import VALUES, variants
from helpers.pixels import MODEL, share, ten, trained


class Counting:
    """Counts the seeds that a generation really draws, and can fail after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> None:
        self.drawn: list[int] = []
        original = Generation._batch

        def batch(generation: Generation, rows: slice) -> object:
            if fail_after is not None and len(self.drawn) >= fail_after:
                raise KeyboardInterrupt
            self.drawn += generation.seeds[rows]
            return original(generation, rows)

        monkeypatch.setattr(Generation, "_batch", batch)


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_interrupted_generation_goes_on(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, expected = tmp_path / name, ten().collect().images
    with monkeypatch.context() as patch:
        Counting(patch, fail_after=4)
        with pytest.raises(KeyboardInterrupt):
            write(ten(), out)
    assert not (out.exists() and out.is_file())
    with monkeypatch.context() as patch:
        count, progress = Counting(patch), []
        write(ten(), out, progress=progress.append)
        assert count.drawn == list(range(4, 10))
        assert sum(progress) == 10
        write(ten(), out)  # whole: nothing is drawn
        assert len(count.drawn) == 6
        more = generate(MODEL, range(12), steps=2)
        if out.is_file():
            with pytest.raises(DataError, match="other seeds"):
                write(more, out)
        else:
            write(more, out)  # two more
            assert count.drawn[6:] == [10, 11]
    assert read_settings(out) == json.loads(json.dumps(ten().settings))
    if out.is_file():
        assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
        with np.load(out) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
            assert arrays["seeds"].tolist() == list(range(10))
        assert labels.tolist() == [seed % 3 for seed in range(10)]
        assert np.array_equal(np.concatenate(list(read_images(out, rows=5))), images)
    else:
        from PIL import Image

        assert len(list(out.glob("*.png"))) == 12
        with Image.open(out / "00000007.png") as image:
            assert image.info["label"] == "1"
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
    assert np.array_equal(images[:10], expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_images_of_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    write(ten(), out)
    with pytest.raises(DataError, match="steps was 2, now 3"):
        write(generate(MODEL, range(10), steps=3), out)
    with pytest.raises(DataError, match="weights was"):
        write(generate(trained(seed=1), range(10), steps=2), out)


def test_other_labels_for_the_same_seeds_are_refused(tmp_path: Path) -> None:
    write(generate(MODEL, [0, 1], [2, 2], steps=1), tmp_path / "out")
    with pytest.raises(DataError, match="has label 2, now it is 0"):
        write(generate(MODEL, [0, 1], [2, 0], steps=1), tmp_path / "out")


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given twice"):
        write(generate(MODEL, [1, 1]), tmp_path / "out")
    with pytest.raises(DataError, match="latents"):
        write(generate(MODEL, [1], decode=False), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").touch()
    with pytest.raises(DataError, match="erw did not write"):
        write(ten(), tmp_path / "mine")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="erw did not write"):
        write(ten(), tmp_path / "other.npz")


def test_two_ranks_share_the_seeds(tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    both(share, str(tmp_path / "store"), str(out))
    expected = ten().collect().images.permute(0, 2, 3, 1).numpy()
    with np.load(out) as arrays:
        assert arrays["seeds"].tolist() == list(range(10))
        # Another batch rounds otherwise, which can tip a pixel by one.
        assert np.abs(arrays["arr_0"].astype(int) - expected.astype(int)).max() <= 1


def test_damaged_npz_files_say_so(tmp_path: Path) -> None:
    write(ten(), tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    for name, message in (("cut", "damaged"), ("floats", "uint8"), ("none", "arr_0")):
        with pytest.raises(DataError, match=message):
            list(read_images(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_an_npz_that_is_none_is_refused_before_drawing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is no \.npz, or was cut short") as error:
        write(ten(), tmp_path / "a.npz")
    assert "pickle" not in str(error.value)
    assert (tmp_path / "a.npz").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jpg", b""),
        ("cats/x.PNG", b""),
        ("settings.json", b'{"lr": 1}'),
        ("settings.json", b'{"solver": "lbfgs", "C": 1}'),
        ("settings.json", b"{"),
        ("settings.json", b"[" * 100_000),
    ],
)
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """Nothing is drawn among other people's images, nor over the settings of another program."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ErwError, match=r"did not write|no JSON object"):
        write(ten(), tmp_path)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [tmp_path / name] and found[0].read_bytes() == content


@pytest.mark.parametrize("name", ["a.png", "cats/00000000.png"])
def test_images_of_somebody_else_are_not_counted_as_ours(tmp_path: Path, name: str) -> None:
    """Put there later: neither gone on with nor scored under our settings."""
    write(generate(MODEL, [0, 1], steps=1), tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "00000000.png").rename(tmp_path / name)
    for use in (
        lambda: write(generate(MODEL, [0, 1], steps=1), tmp_path),
        lambda: opened(tmp_path),
    ):
        with pytest.raises(DataError, match=f"erw did not write, such as {name}: take them out"):
            use()


def test_settings_that_a_stranger_wrote(tmp_path: Path) -> None:
    """Of a folder and of an .npz: the same images are gone on with, or refused in one line."""
    few = lambda: generate(MODEL, [0, 1], [2, 1], steps=1)  # noqa: E731
    write(few(), tmp_path / "a"), write(few(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        arrays = dict(arrays)
    settings, refused = read_settings(tmp_path / "a"), 0
    assert settings == read_settings(tmp_path / "a.npz")
    records = [*variants(settings), *(("all", x) for x in VALUES if x != "delete")]
    for what, record in records:
        (tmp_path / "a" / "settings.json").write_text(json.dumps(record))
        np.savez(tmp_path / "a.npz", **arrays | {"settings": json.dumps(record)})
        for name in ("a", "a.npz"):
            try:
                write(few(), tmp_path / name)
            except ErwError as error:
                refused += 1
                assert name in str(error) and "\n" not in str(error), what
                assert len(str(error).replace(str(tmp_path), "")) < 300, what
            else:
                assert record == settings or name == "a", what
    assert refused >= 2 * len(records) - 2
    del arrays["seeds"]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match="holds other seeds"):
        write(few(), tmp_path / "a.npz")


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(DataError, match=r"a\.txt is a file: choose another --out"):
        write(ten(), tmp_path / "a.txt")


def test_a_picture_without_our_label_is_not_ours(tmp_path: Path) -> None:
    few = lambda: generate(MODEL, [0], [2], steps=1)  # noqa: E731
    write(few(), tmp_path)
    (tmp_path / "00000000.png").write_bytes(png(1))
    with pytest.raises(DataError, match="seed 0 has label None, now it is 2"):
        write(few(), tmp_path)
    (tmp_path / "00000000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000000\.png is damaged: remove it"):
        write(few(), tmp_path)
