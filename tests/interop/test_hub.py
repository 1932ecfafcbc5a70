"""Model cards, and pushing to and reading from a hub: a small real one on this machine."""

import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml

import erw
from erw.cli import main
from erw.errors import CheckpointError, ConfigError
from erw.interop import load_pretrained
from helpers.exported import model
from helpers.hub import Hub, endpoint
from helpers.released import peer, save
from helpers.tiny import tiny_cache, tiny_run
from helpers.training import go


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_pushed_and_read_again(hub: type[Hub], tmp_path: Path) -> None:
    first = model()
    url = erw.push_to_hub(first, "me/mine", out=tmp_path / "out")
    assert url.startswith("http://127.0.0.1:") and url.endswith("/me/mine")
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert hub.files.keys() == there and "pipeline.py" in there
    assert 'from_pretrained("me/mine")' in hub.files["README.md"].decode()
    again = erw.from_pretrained("me/mine")
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(again.velocity(x, t, y), first.velocity(x, t, y))
    assert erw.generate(again, [0], steps=1).collect().images.shape == (1, 3, 64, 64)
    assert {name.rpartition(".")[2] for name in hub.asked} == {"json", "safetensors"}  # no code


def test_without_a_network_the_folder_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint(monkeypatch, "http://127.0.0.1:9")
    path = save(peer(projector=True), tmp_path / "last.pt")
    args = ["export", str(path), "--num-heads", "4", "--push", "me/mine", "--format", "safetensors"]
    assert main(args) == 2
    said = capsys.readouterr().err
    folder = tmp_path / "last-export"
    assert said.startswith("error: could not push to me/mine (") and said.count("\n") == 1
    assert f"{folder} is complete" in said and f"erw export {folder} --push me/mine" in said
    assert erw.from_pretrained(folder).run.name == "last"
    assert main(["export", str(folder), "--push", "me/mine"]) == 2  # that command, still offline
    assert "could not push" in capsys.readouterr().err
    assert main(["export", str(folder), "--push", "mine"]) == 2
    assert "expected owner/name" in capsys.readouterr().err
    assert main(["export", str(folder), "--push", "me/mine", "--vae", "none"]) == 2
    assert "is exported already; leave out vae" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"there is no folder me/mine, and the hub's"):
        erw.from_pretrained("me/mine")


def test_the_card_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings, data, cost, scores of just these weights, and how to use it."""
    run = tiny_run(tiny_cache(tmp_path / "cache", count=16).path)
    go(run, tmp_path / "run")
    score = {
        "values": {"fd_lite2": 12.5}, "count": 100, "reference_count": 200, "encoder": "lite2",
        "reference": "openmoji-test",
        "settings": {
            "vae": f"sd-vae-ft-ema={tmp_path}", "solver": "heun", "steps": 4, "guidance": 1.5,
            "interval": [0, 1],
        },
    }  # fmt: skip
    weights = erw.generate(erw.load(tmp_path / "run"), [0], decode=False).settings["weights"]
    lines = [
        score | {"settings": score["settings"] | {"weights": hashed}, "values": {"fd_lite2": value}}
        for hashed, value in (("another", 99.5), (weights, 12.5))
    ]
    (tmp_path / "run" / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}\n"
    text = (tmp_path / "a" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "diffusers" and "flow-matching" in front["tags"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    assert "12.5000" in text and "99.5" not in text and "heun, 4 steps, guidance 1.5" in text
    for words in ("CC BY-SA 4.0", "16 images of OpenMoji", "FLOPs", "torch 2.", "smileys-emotion",
                  '"lr": 0.002', "after a warm-up (ERW) of 1 blocks for 4 steps"):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in text + (tmp_path / "a" / "erw.json").read_text()
    record = json.loads((tmp_path / "a" / "erw.json").read_text())
    assert record["spent"]["step"] == record["step"] == 12 and record["spent"]["flops_total"] > 0
    assert record["scores"][0]["settings"]["vae"] == "sd-vae-ft-ema"
    early = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "b"), "--checkpoint", "8"]
    assert main([*early, "--format", "safetensors"]) == 0
    record = json.loads((tmp_path / "b" / "erw.json").read_text())
    assert record["spent"]["step"] == record["step"] == 8 and not record["scores"]


def test_the_card_of_a_released_file(tmp_path: Path) -> None:
    found = load_pretrained(save(peer(projector=True), tmp_path / "last.pt"), num_heads=4)
    folder = erw.export(found, tmp_path / "a", format="safetensors")
    text = (folder / "README.md").read_text()
    assert "repa (projectors): 4 x 64, 4 heads" in text and "None were measured" in text
    assert "diffusers" not in text.split("---")[2] and '"optim"' not in text
    with pytest.raises(ConfigError, match="says itself what it is; leave out num_heads"):
        erw.export(folder, tmp_path / "b", num_heads=4)
    with pytest.raises(ConfigError, match="out= is missing"):
        erw.push_to_hub(found, "me/mine")
