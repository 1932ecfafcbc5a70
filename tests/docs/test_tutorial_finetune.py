"""The tutorial on fine-tuning holds: exactly its commands, on fewer images and steps."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from erw import load
from erw.cli import main

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "fine-tune.md"
SHORTER = {  # what is given once more counts
    "prepare": ["--count", "12", "--image-size", "64"],
    "train": ["--tiny", "--steps", "6", "--plan.warmup", "2"],
    "sample": ["--steps", "2", "--seeds", "0:4"],
    "export": [],
}


def commands() -> list[list[str]]:
    """Every `erw` command of the tutorial that stands alone on its line, without the name."""
    found = re.findall(r"^erw (.*)$", TUTORIAL.read_text("utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in found] == ["prepare", "train"] * 2 + ["sample"]
    return [line.split() for line in found]


def test_its_commands_work_on_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands():
        more = SHORTER[command[0]]
        if "--init" in command:  # as it stands: without a warm-up
            more = more[:-2]
        assert main([*command, *more]) == 0, command
    said = capsys.readouterr().err
    line = "begins with runs/five: run quickstart-tiny after 6 steps; 1 of 2 classes by name"
    assert line in said and line.replace("-tiny after 6", " after 500") in TUTORIAL.read_text()
    first, second = load("runs/five"), load("runs/two")
    assert len(first.class_names) == 5 and second.class_names == ("smileys-emotion", "flags")
    recipe = json.loads(Path("runs/two/recipe.json").read_text())
    assert recipe["init"]["source"] == "runs/five" and recipe["resolved"]["plan"]["warmup"] == 0
    drawn = sorted(Path("samples/two").glob("0*.png"))
    assert len(drawn) == 4
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_its_variations_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands()[:3]:
        assert main([*command, *SHORTER[command[0]]]) == 0, command
    third = [*commands()[3], "--tiny", "--steps", "4"]
    for name, more in {
        "warm": ["--plan.warmup", "2"],
        "heads": ["--init-projectors", "--plan.align.0.weight.value", "1"],
        "bare": ["--model.num-classes", "0"],
    }.items():
        assert main([*third, *more, "--out", f"runs/{name}"]) == 0, more
    large = ["prepare", "openmoji", "--groups", "flags", "--count", "8", "--out", "cache/large"]
    assert main([*large, "--image-size", "128"]) == 0
    start = ["--init", "runs/bare", "--data.cache", "cache/large", "--out", "runs/large"]
    assert main([*third, *start]) == 0
    assert load("runs/large").latent_shape[-1] == 32 and load("runs/large").num_classes == 1
    assert main(["export", "runs/heads", "--out", "two"]) == 0
    assert "with its alignment heads" in Path("two/README.md").read_text()
