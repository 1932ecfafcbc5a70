"""Two results side by side: what differs is named, what may differ is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from erw import evaluate
from erw.cli import main
from erw.errors import DataError
from erw.evaluation.compare import differences, read_result
from helpers.images import Pixels, pictures
from helpers.pixels import ten


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kept")
    return evaluate(ten(), reference=pictures(30), encoder=Pixels(), cache=folder).to_dict()


def changed(result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A result with fields, or settings of its generation, of other values, as JSON gives them."""
    made = json.loads(json.dumps(result))
    for name, value in changes.items():
        (made if name in made else made["settings"])[name] = value
    return made


def test_a_result_can_be_compared_with_itself_and_with_another_model(
    result: dict[str, Any],
) -> None:
    assert differences(result, result) == []
    assert differences(result, json.loads(json.dumps(result))) == []
    other = changed(result, weights="0" * 16, step=9, recipe="other", images="another")
    assert differences(result, other) == []


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("steps", 250, "steps 2 here, 250 there"),
        ("solver", "euler", "solver heun here, euler there"),
        ("guidance", 1.8, "guidance 1.0 here, 1.8 there"),
        ("vae", "sd-vae", "vae none here, sd-vae there"),
        ("shift", 3.0, "shift not stated here, 3.0 there"),
        ("autoguidance_weights", "f00", "autoguidance_weights"),
        ("rtol", 1e-3, "rtol not stated here, 0.001 there"),
        ("vae_weights", "f00", "vae_weights"),
        ("labels", "given", "labels balanced: seed modulo classes here, given there"),
        ("ema", 0.9, "ema 0.9999 here, 0.9 there"),
        ("count", 50_000, "count 10 here, 50000 there"),
        ("resolution", [256, 256], "resolution [8, 8] here, [256, 256] there"),
        (
            "features",
            {"fd_lite2": {"encoder": "x", "weights": "pixels"}},
            "encoder of fd_lite2",
        ),
        (
            "features",
            {"fd_lite2": {"encoder": "pixels", "weights": "f0"}},
            "weights of fd_lite2",
        ),
        ("reference_hash", "f00", "reference tensor ("),
        ("reference_count", 10_000, "reference_count 30 here, 10000 there"),
        ("reference_statistics", "stated", "reference_statistics images here, stated there"),
    ],
)
def test_what_changes_a_score_is_named(
    result: dict[str, Any], setting: str, value: Any, words: str
) -> None:
    made = changed(result)
    place = made if setting in made else made["settings"]
    place[setting] = value
    (found,) = (d for d in differences(result, made) if not d.startswith("interval"))
    assert words in found


def test_only_the_networks_of_common_scores_count(result: dict[str, Any]) -> None:
    more = changed(result)
    more["values"]["cmmd"] = 0.5
    more["features"]["cmmd"] = {"encoder": "clip", "weights": "f00", "file": ""}
    assert differences(result, more) == []


def test_validation_images_count_for_fdr(result: dict[str, Any]) -> None:
    one = changed(result)
    one["values"]["fdr_lite2"] = 1.5
    one["features"]["fdr_lite2"] = one["features"]["fd_lite2"]
    other = changed(one, validation="held", validation_hash="f00")
    assert differences(one, other) == ["validation not stated here, held (f00) there"]
    assert differences(result, changed(result, validation="held", validation_hash="f00")) == []


def test_the_interval_counts_only_under_guidance(result: dict[str, Any]) -> None:
    assert differences(result, changed(result, interval=[0.2, 0.7])) == []
    a = changed(result, guidance=1.5)
    assert len(differences(a, changed(a, interval=[0.2, 0.7]))) == 1


def test_images_of_unknown_making_are_said_to_be(result: dict[str, Any]) -> None:
    unknown = changed(result, settings=None)
    assert any("not stated there" in d for d in differences(result, unknown))
    assert differences(unknown, unknown) == []


def test_results_from_files_and_the_command_line(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "scores.jsonl"
    one.write_text(json.dumps(result))
    lines = [changed(result, count=5), changed(result, steps=50)]
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_result(one) == json.loads(json.dumps(result)) and read_result(other) == lines[1]
    assert main(["eval", str(one), "--against", str(other)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("fd_lite2") and "against" in said.out
    assert said.err == "warning: not comparable: steps 2 here, 50 there\n"
    assert main(["eval", str(one), "--against", str(one)]) == 0
    assert capsys.readouterr().err == ""
    other.write_text("no json")
    with pytest.raises(DataError, match="no result"):
        read_result(other)
    assert main(["eval", str(one), "--against", str(tmp_path / "none.json")]) == 2
