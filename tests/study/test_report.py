"""The page: complete in itself, everything on it, and clear errors where something is missing."""

import base64
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from erw.errors import DataError
from erw.study.report import report
from helpers.synthetic_study import (
    STEPS,
    cost_of,
    lines_of,
    png,
    score,
    train_line,
    write_run,
    write_study,
)


class Page(HTMLParser):
    """Collects what a browser would fetch, the words (also those in figures), and the pictures."""

    FETCHES = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.figures: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [values[name] for name in self.FETCHES if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img" and values["src"].startswith("data:image/svg"):
            svg = base64.b64decode(values["src"].partition(",")[2]).decode()
            self.figures.append((values["class"], svg))
            self.text += " ".join(ElementTree.fromstring(svg).itertext())
        elif tag == "img":
            self.pictures.append(values["src"])

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    study = write_study(tmp_path_factory.mktemp("study"), seeds=3)
    return report([study], out=study / "report.html").read_text()


def page_of(paths: list[Path], out: Path, *, drawn: bool = True) -> Page:
    return Page(text_of(paths, out / "r.html", drawn=drawn))


def text_of(paths: list[Path], out: Path, *, drawn: bool) -> str:
    """A page as text, with or without its figures, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr("erw.study.report._figure", lambda *args, **options: [])
        return report(paths, out=out).read_text()


def test_nothing_outside_is_fetched(text: str) -> None:
    page = Page(text)
    assert all(link.startswith("data:") for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in text and "http://" not in text and "https://" not in text
    assert len(page.ids) == len(set(page.ids))


def test_every_method_score_and_picture_is_there(text: str) -> None:
    page = Page(text)
    words = ["Synthetic study", "SiT", "REPA", "ERW", "CC BY-SA 4.0", "warm-up ends", "2.13.0"]
    words += ["Quality at equal cost", "over 3 seeds", "noise time, 0 is clean", "Settings of ERW"]
    words += ["full steps", "teacher", "Final FD-Lite2", "Versions and hardware"]
    words += ["Flow-matching loss of held-out images", "100% of the compute"]
    for word in words:
        assert word in page.text, word
    assert len(page.pictures) == len(set(page.pictures)) == 3 * 4 + 1
    for method in ("SiT", "REPA", "ERW"):
        for i in (1, 2, 3, 4):
            assert f"{score(method, i / 4, 0):.0f}" in page.text


def test_every_figure_is_drawn_for_both_themes_and_widths(text: str) -> None:
    assert "prefers-color-scheme: dark" in text and 'data-theme="dark"' in text
    assert '<meta name="viewport"' in text
    kinds = [kind for kind, _ in Page(text).figures]
    for kind in ("light wide", "light narrow", "dark wide", "dark narrow"):
        assert kinds.count(f"plot {kind}") == len(kinds) // 4 == 3 + 3 * 2 + 2


def test_of_many_points_some_pictures_are_shown_and_the_last(tmp_path: Path) -> None:
    page = page_of([write_study(tmp_path, points=10)], tmp_path, drawn=False)
    assert len(page.pictures) == 3 * 4 + 1
    assert page.text.count("100% of the compute") == 3


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "<script>alert(1)</script>", lines_of("SiT", 0))
    assert "<script>alert" not in text_of([run], tmp_path / "r.html", drawn=False)


def test_the_words_claim_no_more_than_the_seeds_carry(text: str, tmp_path: Path) -> None:
    title, *sentences = verdict(write_study(tmp_path / "one"))
    assert title.startswith("ERW reaches SiT’s final FD‑Lite2 with 0.") and len(sentences) == 4
    assert title.endswith("× its compute") and sentences[-1].startswith("One seed only")
    study = write_study(tmp_path / "three", seeds=3)
    said = verdict(study)
    assert said == words_of(text)  # figures change no word
    assert "over pairs of seeds; final scores do not overlap)." in said[1]
    assert not any("One seed" in sentence for sentence in said)
    listed(study, [f"{name}-{seed}" for name in ("erw", "sit") for seed in range(3)])
    title, sentence = verdict(study)
    assert title == "SiT does not reach ERW’s FD‑Lite2 at equal cost"
    assert sentence == (
        "SiT does not reach ERW’s final FD-Lite2 within the same FLOPs. Every seed of ERW ends "
        "better than every seed of SiT."
    )


def listed(study: Path, names: list[str]) -> Path:
    """The study with these runs."""
    study.mkdir(exist_ok=True)
    record = {"study": {"title": "Listed", "small": False, "samples": 500}, "runs": names}
    (study / "study.json").write_text(json.dumps(record))
    return study


def verdict(study: Path, *, drawn: bool = False) -> list[str]:
    """Title and lead of a study's page, by default without its figures."""
    return words_of(text_of([study], study / "report.html", drawn=drawn))


def words_of(text: str) -> list[str]:
    lines = re.findall(r'<(?:h1|p class="lead")>(.*?)</(?:h1|p)>', text, re.DOTALL)
    return [html.unescape(line) for line in lines]


def close(folder: Path, name: str, seed: int, step: int = 0) -> Path:
    """A run of seeds that differ more than methods do; `step`: it is under way up to there."""
    lines = [train_line(step or STEPS["SiT"], "SiT", 0)]
    for i in (1, 2, 3, 4):
        values = {"fd_lite2": 300.0 - 20 * i + 3 * seed - len(name)}
        lines.append({"kind": "eval", **cost_of(500 * i, "SiT", 0), "values": values, "how": {}})
    return write_run(folder / "runs" / f"{name}-{seed}", name, lines, seed=seed)


def test_overlapping_seeds_are_said_to_overlap(tmp_path: Path) -> None:
    runs = [close(tmp_path, name, seed) for name in ("SiT", "REPA") for seed in (0, 1)]
    study = listed(tmp_path, [run.name for run in runs])
    assert "overlap: REPA and SiT are not told apart." in verdict(study)[1]


def test_runs_under_way_are_not_compared(tmp_path: Path) -> None:
    folders = [close(tmp_path, name, 0) for name in ("SiT", "REPA")]
    folders.append(close(tmp_path, "ERW", 0, step=1000))
    study = listed(tmp_path, [folder.name for folder in folders])
    title, *_, last = verdict(study, drawn=True)
    assert title.startswith("REPA reaches SiT’s") and last == "Still under way: ERW."
    assert verdict(listed(tmp_path, ["REPA-0", "ERW-0"]))[0] == "The study is under way"


def test_a_smoke_study_compares_nothing(tmp_path: Path) -> None:
    study = write_study(tmp_path, pictures=False)
    record = json.loads((study / "study.json").read_text())
    record["study"]["small"] = True
    (study / "study.json").write_text(json.dumps(record))
    page = page_of([study], tmp_path, drawn=False)
    assert "nothing here compares methods" in page.text and not page.pictures


def test_a_single_run_has_curves_samples_and_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tried", "debug", lines_of("ERW", 0), lr=0.125)
    (run / "samples").mkdir()
    (run / "samples" / "00000000.png").write_bytes(png(16, 16, (9, 9, 9)))
    page = page_of([run], tmp_path)
    for word in ("tried: step 2,300", "Flow-matching loss", "warm-up ends", "0.125", "CC BY-SA"):
        assert word in page.text
    assert len(page.pictures) == 1


def test_several_runs_share_the_figures(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, n, lines_of("REPA", i)) for i, n in enumerate(("one", "two"))]
    page = page_of(runs, tmp_path)
    assert (
        "Scores while training" in page.text
        and "FD-Lite2 over training compute (lower is better)" in page.text
    )
    assert f"two {score('REPA', 1, 1):.4g}" in page.text


def test_runs_without_scores_make_a_page(tmp_path: Path) -> None:
    lines = [line for line in lines_of("SiT", 0) if line["kind"] == "train"]
    runs = [write_run(tmp_path / name, name, lines) for name in ("first", "second")]
    page = page_of(runs, tmp_path, drawn=False)
    assert "2 training runs" in page.text and "None yet" in page.text


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    picture = next(study.glob("runs/sit-0/previews/*.png"))
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(DataError, match=f"{picture.name} is no complete PNG"):
        report([study], out=tmp_path / "r.html")


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run to report on"):
        report([], out=tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report([tmp_path / "nowhere"], out=tmp_path / "r.html")
