"""The page: complete in itself, everything on it, and clear errors where something is missing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from erw.errors import DataError
from erw.study.report import report
from erw.study.results import curve_from, read_metrics, read_results
from helpers.synthetic_study import png, synthetic, write_study


class Page(HTMLParser):
    """Collects what a browser would fetch, the words, and the pictures."""

    FETCHES = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")

    def __init__(self, text):
        super().__init__()
        self.links, self.words, self.pictures, self.tags, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in self.FETCHES:
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value)
            if name == "src" and tag == "img":
                self.pictures.append(value)
            if name == "style" and value and "url(" in value:
                self.links.append(value.split("url(")[1].split(")")[0])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), synthetic(seeds=3))


@pytest.fixture(scope="module")
def text(study):
    return report([study], out=study / "report.html").read_text()


def test_nothing_outside_is_fetched(text):
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in text and "http://" not in text and "https://" not in text


def test_every_method_point_and_picture_is_there(text):
    page, results = Page(text), synthetic(seeds=3)
    words = " ".join(page.words)
    for name in ("SiT", "REPA", "ERW", "OpenMoji, CC BY-SA 4.0", "warm-up ends", "2.13.0"):
        assert name in words
    firsts = [row for row in results.rows if row.seed == 0]
    assert len(page.pictures) == len(firsts) + len(results.pictures)
    assert len(set(page.pictures)) == len(page.pictures)
    for row in firsts:
        assert f"{row.fd_lite2:.0f}" in words


def test_ids_are_not_used_twice(text):
    ids = Page(text).ids
    assert len(ids) == len(set(ids))


def test_both_themes_and_both_widths(text):
    assert "prefers-color-scheme: dark" in text and 'data-theme="dark"' in text
    assert '<meta name="viewport"' in text
    assert text.count('<div class="wide">') == text.count('<div class="narrow">') > 0
    assert "/*light*/" not in text and "/*dark*/" not in text


def test_the_verdict_says_when_seeds_overlap(tmp_path):
    results = synthetic(seeds=3)
    close = [
        row._replace(fd_lite2=300 - 100 * (row.fraction or 0) + row.seed) for row in results.rows
    ]
    folder = write_study(tmp_path, results.__class__(**{**vars(results), "rows": tuple(close)}))
    assert (
        "overlap: ERW and SiT are not told apart"
        in report([folder], out=tmp_path / "r.html").read_text()
    )


def test_of_many_points_some_pictures_are_shown_and_the_last(tmp_path):
    results = synthetic(points=10)
    page = Page(report([write_study(tmp_path, results)], out=tmp_path / "r.html").read_text())
    assert len(page.pictures) == 3 * 4 + 1
    assert "".join(page.words).count("100 % of the budget") == 3


def test_names_cannot_inject_markup(tmp_path):
    results = synthetic()
    odd = results.__class__(**{**vars(results), "title": "<script>alert(1)</script>"})
    text = report([write_study(tmp_path, odd)], out=tmp_path / "r.html").read_text()
    assert "<script>alert" not in text


def test_results_without_pictures_or_curves_make_a_page(tmp_path):
    results = synthetic(pictures=False)
    bare = results.__class__(rows=results.rows)
    text = report([write_study(tmp_path, bare)], out=tmp_path / "r.html").read_text()
    assert "Quality at equal cost" in text and "<img" not in text


# -- plain training runs ------------------------------------------------------------------------


def metrics_line(step, *, warmup=5):
    warm = step <= warmup
    return {
        "kind": "train", "step": step, "images": 8 * step, "flops_total": 10**9 * step,
        "flops_warmup": 10**9 * min(step, warmup), "flops_teacher": 0, "seconds": 0.5 * step,
        "loss": 1.0 / step, "flow": 0.0 if warm else 2.0 / step, "align": -0.5,
        "align_weight": 0.5, "grad_norm": 1.0, "lr": 1e-3, "phase": "warmup" if warm else "full",
    }  # fmt: skip


def run_folder(folder: Path, *, steps=40) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(metrics_line(step)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.json").write_text(
        json.dumps(
            {"run": {"name": "tried", "optim": {"lr": 0.1}}, "cache": {"vae": "openmoji-f4c4"}}
        )
    )
    return folder


def test_a_single_run_has_curves_samples_and_settings(tmp_path):
    run = run_folder(tmp_path / "tried")
    (run / "samples").mkdir()
    (run / "samples" / "00000000.png").write_bytes(png(16, 16, (9, 9, 9)))
    page = Page(report([run], out=tmp_path / "r.html").read_text())
    words = " ".join(page.words)
    for word in (
        "tried",
        "Step 40",
        "Flow-matching loss",
        "warm-up ends",
        "run.optim.lr",
        "CC BY-SA 4.0",
    ):
        assert word in words
    assert len(page.pictures) == 1
    assert all(link.startswith(("data:", "#")) for link in page.links)


def test_several_runs_share_the_figures(tmp_path):
    runs = [run_folder(tmp_path / name) for name in ("first", "second")]
    words = " ".join(Page(report(runs, out=tmp_path / "r.html").read_text()).words)
    assert "2 training runs" in words and "first" in words and "second" in words


def test_scores_while_training_are_drawn(tmp_path):
    runs = [run_folder(tmp_path / name) for name in ("first", "second")]
    for shift, run in enumerate(runs):
        lines = [
            {"kind": "eval", "step": step, "flops_total": 10**9 * step,
             "values": {"fd_lite2": 700.0 - step - shift, "recall": 0.1 * shift}}
            for step in (10, 20, 40)
        ]  # fmt: skip
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    text = report(runs, out=tmp_path / "r.html").read_text()
    words = " ".join(Page(text).words)
    assert "Scores while training" in words and "fd_lite2 over flops (lower is better)" in words
    assert "recall over flops (higher is better)" in words and "second 659" in words


def test_curves_know_the_phases(tmp_path):
    curve = curve_from(read_metrics(run_folder(tmp_path / "run", steps=1000)), points=50)
    assert len(curve["step"]) <= 52
    warm = [step for step, is_warm in zip(curve["step"], curve["warmup"], strict=True) if is_warm]
    assert warm == [5], "the last warm-up step ends a bin"
    assert curve["flow"][0] is None, "there is no flow loss in warm-up"
    assert curve["flow"][1] is not None


def test_a_short_last_window_counts_for_what_it_is(tmp_path):
    lines = [metrics_line(step, warmup=0) for step in (*range(10, 101, 10), 101)]
    lines[-1]["flow"] = 50.0
    run = run_folder(tmp_path / "run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = curve_from(read_metrics(run))
    assert curve["step"] == [*range(10, 91, 10), 101]
    assert curve["flow"][-1] == pytest.approx((10 * lines[-2]["flow"] + 50.0) / 11)


# -- clear errors -------------------------------------------------------------------------------


def test_a_run_without_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .*not the folder"):
        report([tmp_path], out=tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report([tmp_path / "nowhere"], out=tmp_path / "r.html")


def test_metrics_cut_short_name_the_line(tmp_path):
    run = run_folder(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-40])
    with pytest.raises(DataError, match=r"line 40 is cut short or damaged; run the same train"):
        report([run], out=tmp_path / "r.html")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no training line yet"):
        report([run], out=tmp_path / "r.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["rows"][0].pop("fd_lite2"), "row 0 lacks 'fd_lite2'"),
        (lambda c: c["rows"][2].update(speed=1), "row 2 has the unknown key 'speed'"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.pop("rows"), "is no study result"),
    ],
)
def test_results_of_another_shape(tmp_path, change, message):
    folder = write_study(tmp_path, synthetic())
    content = json.loads((folder / "results.json").read_text())
    change(content)
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_results(folder)


def test_results_cut_short(tmp_path):
    folder = write_study(tmp_path, synthetic())
    text = (folder / "results.json").read_text()
    (folder / "results.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"results\.json is damaged at line"):
        report([folder], out=tmp_path / "r.html")


def test_a_missing_or_damaged_picture_is_named(tmp_path):
    folder = write_study(tmp_path, synthetic())
    picture = folder / str(synthetic().rows[0].picture)
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(DataError, match="no complete PNG"):
        report([folder], out=tmp_path / "r.html")
    picture.unlink()
    with pytest.raises(FileNotFoundError, match="named in the results"):
        report([folder], out=tmp_path / "r.html")


def test_a_study_and_a_run_do_not_mix(tmp_path):
    folder = write_study(tmp_path / "study", synthetic())
    with pytest.raises(DataError, match="report on studies alone"):
        report([folder, run_folder(tmp_path / "run")], out=tmp_path / "r.html")


def test_results_come_back_as_they_were(tmp_path):
    results = synthetic(seeds=2)
    assert read_results(write_study(tmp_path, results)) == results


def test_studies_that_differ_in_their_seeds_are_one(tmp_path):
    whole = synthetic(seeds=3)
    for seed in range(3):
        rows = tuple(row for row in whole.rows if row.seed == seed)
        curves = {k: c for k, c in whole.curves.items() if k.endswith(f"/{seed}")}
        settings = {
            "study": {"name": "synthetic", "samples": 500, "seeds": [seed]},
            "methods": {m: {"seed": seed, "data": {"cache": str(seed)}} for m in whole.methods},
        }
        changes = {"rows": rows, "curves": curves, "settings": settings}
        write_study(tmp_path / str(seed), whole.__class__(**{**vars(whole), **changes}))
    folders = [tmp_path / str(seed) for seed in range(3)]
    page = Page(report(folders, out=tmp_path / "r.html").read_text())
    assert "over 3 seeds" in " ".join(page.words)
    assert len(page.pictures) == len([r for r in whole.rows if r.seed == 0]) + 1
    with pytest.raises(DataError, match="seed in common"):
        report([folders[0], folders[0]], out=tmp_path / "r.html")
