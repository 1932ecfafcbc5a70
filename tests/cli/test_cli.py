"""The command line: what is typed wrong gets one line that says what to do, and an exit code."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image
from tyro._docstrings import get_field_docstring

from erw.cli import VERBS, main
from erw.cli.analyze import Analysis
from erw.cli.prepare import Prepare
from erw.cli.sample import Draw, generation_of, label_number, seeds_of
from erw.cli.settings import explain
from erw.config import Run
from erw.data.cache import Cache
from erw.errors import ConfigError
from helpers.forked import Python
from helpers.images import pictures, save_pngs
from helpers.pixels import MODEL

TINY = ["--steps", "4", "--log.every", "1", "--plan.warmup", "2"]


class Said(NamedTuple):
    """What a command left: exit code, standard output, and standard error."""

    code: int
    out: str
    err: str


Erw = Callable[..., Said]


@pytest.fixture
def erw(capsys: pytest.CaptureFixture[str]) -> Erw:
    """erw("train", "debug") runs that command in this process."""

    def run(*argv: str | Path) -> Said:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight random pictures."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        for i in range(8):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    assert main(["prepare", str(images), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "debug", "--out", str(folder), "--data.cache", str(cache), *TINY]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of one's own to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def refused(said: Said, *words: str, code: int = 2) -> None:
    """One line on stderr, nothing on stdout, that exit code, and all of `words` in the line."""
    assert said.code == code, said
    *progress, line = said.err.splitlines()
    assert line.startswith("error: ") and all("left" in text for text in progress), said.err
    assert not said.out
    for word in words:
        assert word in line, f"{word!r} is missing in: {line}"


# -- what is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian debug", ["trian", "did you mean train"]),
        ("train", ["recipe", "erw show"]),
        ("train debgu --out x", ["debgu", "did you mean debug"]),
        ("show quickstrat", ["quickstrat", "did you mean quickstart"]),
        ("train debug", ["--out"]),
        ("train debug --out x --optim.lrr 1", ["--optim.lrr", "did you mean --optim.lr?"]),
        ("train debug --out x --lr 1", ["--lr", "did you mean --optim.lr?"]),
        ("train debug --out x 7", ["Unrecognized", "7"]),
        ("train debug --out x --optim.lr fast", ["--optim.lr", "float", "'fast'"]),
        ("train debug --out x --steps 2.5", ["--steps", "int", "'2.5'"]),
        ("train debug --out x --model.rope maybe", ["--model.rope", "true or false"]),
        ("train debug --out x --model.channels x", ["--model.channels", "int", "'x'"]),
        ("train debug --out x --plan.align.0.loss cosin", ["'cosin'", "did you mean cosine"]),
        ("train debug --out x --plan.projector frehs", ["--plan.projector", "'fresh'"]),
        ("train debug --out x --plan.align.0.blok 2", ["did you mean --plan.align.0.block?"]),
        ("train debug --out x --plan.align.2.block 2", ["--plan.align.2.block"]),
        ("train debug --out x --optim.betas 0.9", ["--optim.betas", "2"]),
        ("train debug --out x --optim.lr", ["--optim.lr", "Expected 1 value"]),
        ("train debug --out x --optim.lr -1e-3", ["error: optim.lr is -0.001", "(0, inf)"]),
        ("train debug --out x --optim.lr nan", ["optim.lr is nan", "(0, inf)"]),
        ("train debug --out x --steps 0", ["steps is 0", "[1, inf)"]),
        ("train debug --out x --data.batch_size 0", ["data.batch_size is 0"]),
        ("train debug --out x --plan.depth 9", ["plan.depth 9", "4 blocks"]),
        ("train debug --out x --plan.warmup 99", ["plan.warmup 99", "whole run"]),
        ("train debug --out x --model.heads 5", ["model.width 32", "model.heads"]),
        (
            "train debug --out x --plan.align.0.weight.kind linear",
            ["weight.over is 0", "steps > 0"],
        ),
        ("train debug --out x --data.cache nowhere", ["nowhere", "erw prepare"]),
        ("prepare", ["--out"]),
        ("prepare --out x", ["IMAGES"]),
        ("prepare nowhere --out x", ["nowhere"]),
        ("prepare openmoji --out x --encoders efficientnet-lite1", ["did you mean", "lite"]),
        ("prepare openmoji --out x --vae nowhere", ["nowhere", "openmoji-f4c4"]),
        ("prepare openmoji --out x --precision half", ["--precision", "'float32'"]),
        ("prepare openmoji --out x --image-size 62", ["62", "4"]),
        ("prepare openmoji --out x --count 0", ["0", "at least 1"]),
        ("sample", ["run"]),
        ("sample nowhere --out x", ["nowhere"]),
        ("report nowhere --out x.html", ["nowhere"]),
        ("report --out x.html", ["run"]),
        ("eval", ["run"]),
        ("eval nowhere", ["nowhere"]),
        ("eval openmoji-test", ["--reference"]),
        ("study", ["demo"]),
        ("study dmo --out x", ["dmo", "did you mean demo"]),
        ("study demo --out x --set eval.samples=1", ["eval.samples is 1", "[2, inf)"]),
        ("study demo --out x --set eval.sampls=1", ["eval.sampls", "did you mean eval.samples"]),
        ("study grid --out x", ["--grid", "plan.depth=3,4,5"]),
        ("study nowhere.py --out x", ["nowhere.py"]),
        ("study demo --out x --engine slrum", ["'slrum'", "did you mean slurm"]),
    ],
)
def test_what_is_typed_wrong(
    erw: Erw, argv: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(erw(*argv.split()), *words)
    assert not list(tmp_path.iterdir()), "something was written"


# -- images and caches ----------------------------------------------------------------------------


def test_folders_without_images(erw: Erw, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(erw("prepare", folder, "--out", tmp_path / "x"), str(folder), "no images")
    (folder / "notes.txt").write_text("no image")
    refused(erw("prepare", folder, "--out", tmp_path / "x"), str(folder), ".txt")


def test_unreadable_images(erw: Erw, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"\x89PNG, but no more")
    said = erw("prepare", folder, "--out", tmp_path / "y")
    last = said.err.splitlines()[-1]
    assert said.code == 2 and last.startswith("error: ") and "bad.png" in last


def test_a_cache_folder_that_is_taken(erw: Erw, images: Path, cache: Path, tmp_path: Path) -> None:
    refused(erw("prepare", images, "--out", cache, "--flip"), str(cache), "flip")
    refused(erw("prepare", images, "--out", images), str(images), "another folder")


def test_caches_that_do_not_fit(erw: Erw, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train = ["train", "debug", "--out", out, "--data.cache", cache]
    refused(erw(*train, "--model.patch", "4"), "64 tokens", "16", "patch")
    refused(
        erw(*train, "--data.features", "efficientnet-lite2"), "efficientnet-lite2", "--encoders"
    )
    refused(erw(*train, "--model.num-classes", "5"), "num_classes is 5", "2")
    refused(erw(*train, "--model.input-size", "8"), "input_size is 8", "16")
    assert not out.exists()


def test_a_cache_that_is_cut_short(erw: Erw, cache: Path, tmp_path: Path) -> None:
    short = shutil.copytree(cache, tmp_path / "short")
    shard = next((short / "shards").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    said = erw("train", "debug", "--out", tmp_path / "out", "--data.cache", short)
    refused(said, shard.name, "cut short or missing", "erw prepare")
    (short / "manifest.json").unlink()
    said = erw("train", "debug", "--out", tmp_path / "out", "--data.cache", short)
    refused(said, str(short), "erw prepare")


# -- runs and checkpoints -------------------------------------------------------------------------


def test_a_run_begins_with_what_prepare_says(
    erw: Erw, images: Path, cache: Path, tmp_path: Path
) -> None:
    """Images and classes, or that there are none; a class all of whose images are damaged."""
    first = erw("train", "debug", "--out", tmp_path / "a", "--data.cache", cache, *TINY)
    line = f"16 images of {cache}, 2 classes (cats, dogs) of 8 to 8 images"
    assert first.err.splitlines()[0] == line
    counted = erw("prepare", images, "--out", tmp_path / "no", "--dry-run").out.splitlines()[0]
    assert counted.endswith(line.partition(",")[2])

    shutil.copytree(images, tmp_path / "set")
    (tmp_path / "set" / "eels").mkdir()
    (tmp_path / "set" / "eels" / "0.png").write_bytes(b"no image")
    (tmp_path / "set" / "dogs" / "0.png").unlink()
    for name, options, lines in [
        (
            "some",
            [],
            ["3 classes (cats, dogs, eels) of 0 to 8", "classes without images: 1 (eels)"],
        ),
        ("none", ["--classes", "none"], ["15 images of", "no classes: the set is unconditional"]),
    ]:
        for argv in (["prepare", tmp_path / "set", *options], ["train", "debug", *TINY]):
            more = ["--data.cache", tmp_path / name] if argv[0] == "train" else []
            out = tmp_path / (f"{name}-run" if more else name)
            said = erw(*argv, "--out", out, *more).err
            assert all(line in said for line in lines), said
    kept = json.loads((tmp_path / "some-run" / "recipe.json").read_text())["cache"]
    assert kept["empty_classes"] == [2]


def test_a_run_goes_on_and_refuses_another(erw: Erw, run: Path, cache: Path) -> None:
    train = ["train", "debug", "--out", run, "--data.cache", cache, *TINY]
    assert erw(*train).code == 0
    said = erw(*train, "--optim.lr", "5e-4")
    refused(said, str(run), "optim.lr", "0.002", "0.0005", "--out")


def test_an_output_folder_with_other_files(erw: Erw, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    said = erw("train", "debug", "--out", tmp_path, "--data.cache", cache)
    refused(said, str(tmp_path), "--out")


def test_damaged_weights(erw: Erw, run: Path, cache: Path, tmp_path: Path) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    for path in (newest, run / "ema.safetensors"):
        os.truncate(path, path.stat().st_size - 100)
    said = erw("train", "debug", "--out", run, "--data.cache", cache, *TINY)
    last = said.err.splitlines()[-1]
    assert said.code == 2 and last.startswith("error: ") and newest.name in last
    refused(erw("sample", run, "--out", tmp_path / "x"), "ema.safetensors")


def test_weights_of_another_model(erw: Erw, run: Path, cache: Path, tmp_path: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["resolved"]["model"]["depth"] = 5
    (run / "recipe.json").write_text(json.dumps(recipe))
    refused(erw("sample", run, "--out", tmp_path / "x"), "ema.safetensors", "blocks.4")
    (run / "recipe.json").write_text("{}")
    refused(erw("sample", run, "--out", tmp_path / "x"), "recipe.json")


def test_labels_seeds_and_samples(erw: Erw, trained: Path, tmp_path: Path) -> None:
    sample = ["sample", trained, "--out", tmp_path / "out"]
    refused(erw(*sample, "--labels", "2"), "2", "0..1")
    refused(erw(*sample, "--labels", "dog"), "dog", "did you mean dogs")
    refused(erw(*sample, "--labels", "0,1,0"), "3 labels", "16 seeds")
    refused(erw(*sample, "--seeds", "1-9"), "--seeds", "3,5,8:10")
    refused(erw(*sample, "--seeds", "5:5"), "seeds")
    refused(erw(*sample, "--solver", "rk4"), "unknown solver 'rk4'", "heun")
    refused(erw(*sample, "--vae", "nowhere"), "nowhere")
    said = erw(*sample, "--seeds", "0:3,7", "--labels", "dogs", "--steps", "1", "--solver", "euler")
    assert said.code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 4
    refused(erw(*sample, "--steps", "2"), "steps was 1, now 2", "--out")


def test_a_loss_that_is_not_finite_ends_with_3(erw: Erw, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ["train", "debug", "--out", out, "--data.cache", cache, "--log.checkpoint", "1"]
    said = erw(*train, "--optim.lr", "1e30", "--optim.lr_warmup", "0")
    last = said.err.splitlines()[-1]
    assert said.code == 3 and last.startswith("error: ")
    assert "not finite in step 2" in last and "step-00000001" in last


def test_a_full_disk(cache: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for it: the system refuses the write half-way."""
    argv = ["train", "debug", "--out", tmp_path / "run", "--data.cache", cache, *TINY]
    done = Python("-m", "erw", *argv, largest_file=20_000)
    assert done.wait() == 2 and done.err.splitlines()[-1].startswith("error: "), done.err
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


@pytest.mark.parametrize("name,code", [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_a_run_that_is_told_to_stop_saves(
    cache: Path, tmp_path: Path, name: str, code: int
) -> None:
    out = tmp_path / "run"
    argv = ["train", "debug", "--out", out, "--data.cache", cache, "--log.every", "1"]
    process = Python("-m", "erw", *argv, "--steps", "5000", "--log.checkpoint", "5000")
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == code, process.err
    last = process.err.splitlines()[-1]
    assert last.startswith(("interrupted: ", "preempted: ")) and "same command" in last
    step = len(metrics.read_text().splitlines())
    assert (out / "checkpoints" / f"step-{step:08d}.safetensors").exists()


# -- what is right --------------------------------------------------------------------------------


def test_help_names_every_verb_and_every_setting(erw: Erw) -> None:
    said = erw("--help")
    assert said.code == 0 and not said.err
    assert all(f"  {verb} " in said.out for verb in VERBS)
    for verb in VERBS:
        assert erw(verb, "--help").code == 0
    said = erw("train", "debug", "--help")
    assert said.code == 0
    for text in (
        "--optim.lr FLOAT",
        "0.002",
        "--data.batch-size INT",
        "--plan.align.0.weight.kind",
        "--out",
    ):
        assert text in said.out
    assert erw("--version").out.startswith("erw ")


def test_every_setting_has_a_text(erw: Erw) -> None:
    text = " ".join(re.sub("[│|]", " ", erw("train", "debug", "--help").out).split())
    kinds = r"FLOAT|INT|STR|true false|FLOAT none|INT none|STR none|\S+ \[\S+ \.\.\.\]\]|\{\S+\}"
    assert len(re.findall(rf"--[\w.-]+ (?:{kinds})", text)) > 60
    assert not re.findall(rf"--[\w.-]+ (?:FLOAT )?(?:{kinds}) \(default", text)


def test_the_text_of_a_setting_is_the_comment_that_tyro_finds() -> None:
    def records(kind: Any) -> Iterator[Any]:
        if not dataclasses.is_dataclass(kind):
            inner = get_args(kind)
        elif isinstance(kind, type):
            yield kind
            inner = get_type_hints(kind).values()
        for part in inner:
            yield from records(part)

    seen = [*records(Run), *records(Draw), *records(Prepare), *records(Analysis)]
    for record in seen:
        explain(record)
        for field in dataclasses.fields(record):
            found = get_field_docstring(record, field.name, ()) or ""
            assert field.metadata["help"].split() == found.split(), (record, field.name)
    assert len(seen) > 13


def test_completion_knows_verbs_and_settings(erw: Erw) -> None:
    script = erw("--completion", "bash").out
    assert "complete -F" in script
    for word in (*VERBS, "--optim.lr", "--plan.align.0.block", "--sigma-rel", "--guidance"):
        assert word in script, word


def test_the_built_in_cache_is_prepared_by_the_first_run(
    erw: Erw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("erw.recipes.quickstart.IMAGES", 32)
    said = erw("train", "debug", "--out", "run", *TINY)
    assert said.code == 0 and "preparing 32 of the built-in images" in said.err
    assert len(Cache.open("cache/quickstart")) == 32
    said = erw("train", "debug", "--out", "other", *TINY)
    assert said.code == 0 and "preparing" not in said.err
    Path("cache/quickstart/manifest.json").unlink()  # as if it had been stopped
    said = erw("train", "debug", "--out", "third", *TINY)
    assert said.code == 0 and "preparing 32 of the built-in images" in said.err


def test_metrics_go_to_the_tracker_that_log_to_names(
    erw: Erw, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("erw.cli.train.to_tracker", lambda name, run, out: lines.append)
    train = ["train", "debug", "--out", tmp_path / "run", "--data.cache", cache, *TINY]
    assert erw(*train, "--log.to", "wandb", "--plan.align.1.block", "1").code == 0
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "align1" in lines[-1]["losses"]
    monkeypatch.undo()
    refused(erw(*train, "--log.to", "wanbd"), "wanbd", "did you mean wandb")


def test_dry_runs_write_nothing(
    erw: Erw, images: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "debug", "--out", "run", "--data.cache", cache, "--dry-run"]
    said = erw(*train, "--optim.lr=2e-4", "--data.batch_size", "16")
    assert said.code == 0
    for text in ("--optim.lr 0.0002", "--data.batch-size 16", "parameters", "FLOP", "warm-up step"):
        assert text in said.out
    said = erw("prepare", images, "--out", "cache", "--dry-run")
    assert said.code == 0 and "16 images" in said.out and "2 classes (cats, dogs)" in said.out
    assert "MB" in said.out
    assert erw("study", "smoke", "--out", "study", "--dry-run").code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text,problem",
    [
        ("\ndef study():\n    return dict(**{}, a=1)['b']\n", ", line 3: KeyError: 'b'"),
        ("def study(:\n", ", line 1: SyntaxError: invalid syntax"),
        ("import erw\nstudy = lambda: erw.recipe('nosuch')\n", "nosuch"),
        ("study = 3\n", " needs a function study() that returns a Study"),
    ],
)
def test_what_is_wrong_in_a_study_of_ones_own(
    erw: Erw, tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    said = erw("study", tmp_path / "mine.py", "--out", tmp_path / "study", "--dry-run")
    assert said.code == 2 and len(said.err.splitlines()) == 1 and problem in said.err


def test_a_dry_run_foretells_the_bytes(erw: Erw, images: Path, cache: Path, tmp_path: Path) -> None:
    said = erw("prepare", images, "--out", tmp_path / "x", "--dry-run")
    told = 1e6 * float(said.out.split()[-2])
    real = sum(path.stat().st_size for path in (cache / "shards").glob("*.safetensors"))
    assert abs(told - real) < 0.1 * real


def test_show_lists_and_prints_what_can_be_typed_again(erw: Erw, cache: Path) -> None:
    said = erw("show")
    assert said.code == 0 and "quickstart " in said.out and "sit_xl2_in256_erw" in said.out
    said = erw("show", "sit_b2_in256_erw", "--tiny", "--data.cache", cache)
    assert said.code == 0 and "not known" not in said.out
    again = erw("show", "debug", *said.out.split("\n\n")[0].split())
    assert again.out == said.out


def test_eval_of_a_run_and_of_images(erw: Erw, run: Path, images: Path, tmp_path: Path) -> None:
    refused(erw("eval", run), "--reference")
    refused(erw("eval", run, "--reference", images, "--metric", "fid"), "fid", "--weights")
    refused(erw("eval", run, "--reference", tmp_path / "nowhere"), "nowhere")
    short = ["--seeds", "0:8", "--steps", "1", "--solver", "euler"]
    said = erw("eval", run, "--reference", images, *short)
    assert said.code == 0 and said.out.startswith("fd_lite2 ")
    kept = json.loads((run / "scores.jsonl").read_text())
    assert kept["count"] == 8 and kept["reference_count"] == 16 and kept["settings"]["steps"] == 1
    said = erw("memory", run, "--training", images, *short)
    assert said.code == 0 and said.out.startswith("least ")
    refused(erw("memory", run, *short), "holds no images", "--images")
    out = tmp_path / "scores.json"
    said = erw("eval", images / "cats", "--reference", images / "cats", "--out", out)
    assert said.code == 0 and abs(json.loads(out.read_text())["values"]["fd_lite2"]) < 1e-3


def test_report(erw: Erw, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert erw("report", trained, "--out", page).code == 0 and page.exists()


def test_python_m_erw() -> None:
    argv = [sys.executable, "-m", "erw", "show", "debgu"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(erw: Erw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erw.recipes.names", lambda: [][0])
    said = erw("show")
    assert said.code == 1 and "Traceback" in said.err and "bug" in said.err.splitlines()[-1]


def test_a_label_is_a_name_first_and_two_meanings_are_refused() -> None:
    names = ("0", "1", "10", "2", "cat", "11")
    assert [label_number(text, names) for text in ("0", "1", "10", "11", "cat")] == [0, 1, 2, 5, 4]
    assert [label_number(f"#{n}", names) for n in range(6)] == list(range(6))
    assert label_number("3", names) == 3  # a number alone
    with pytest.raises(ConfigError, match="give #3 or #2"):
        label_number("2", names)
    assert label_number("7", ()) == 7
    model = dataclasses.replace(MODEL, class_names=("cafe\u0301", "salt, pepper", "tea"))
    for text, number in (("caf\u00e9", 0), ("cafe\u0301", 0), ("salt, pepper", 1), ("tea", 2)):
        assert generation_of(model, Draw(seeds="0:1", labels=text)).labels == (number,)


def test_seeds_that_no_memory_holds_are_refused() -> None:
    assert seeds_of("3,5,8:10") == [3, 5, 8, 9]
    with pytest.raises(ConfigError, match="0:1000000000000 is more than 10,000,000 images"):
        seeds_of("7,0:1000000000000")


def test_scores_are_not_computed_for_a_folder_as_their_file(erw: Erw, tmp_path: Path) -> None:
    images = save_pngs(tmp_path / "images", pictures(2))
    said = erw("eval", str(images), "--reference", str(images), "--out", str(tmp_path))
    assert said.code == 2 and "is a folder: name a file in it" in said.err and not said.out
