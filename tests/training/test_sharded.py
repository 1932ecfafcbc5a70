"""A sharded run is the run of one process to rounding, and its checkpoints are any process's."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import erw
from erw.config import Dist, Eval
from erw.dist import World, unsynced, whole
from erw.errors import CheckpointError, ConfigError
from erw.evaluation.callback import validating
from erw.interop.convert import convert
from erw.rng import Draws
from erw.sharding import mesh_of, shard
from erw.training.checkpoint import INDEX, paths, read, remove_partial
from erw.training.network import build_network
from erw.training.objective import total
from erw.training.sharded import Saver
from erw.training.trained import WEIGHTS
from helpers.tiny import tiny_run
from helpers.training import (
    HERE,
    assert_close,
    assert_same_run,
    go,
    last,
    logged,
    trainer,
    two_ranks,
)


@pytest.fixture(scope="module")
def sharded(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes without a stop, each of which has half of everything."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    two_ranks(cache, out, "--strategy", "fsdp2")
    return out


def before_the_last(run: Path, out: Path) -> Path:
    """A copy of a run, as it was before its last checkpoint, that of step 12."""
    shutil.copytree(run, out)
    newest = paths(out / "checkpoints")[-1]
    shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
    (out / WEIGHTS).unlink()
    return out


def assert_close_run(one: Path, other: Path) -> None:
    assert_close(last(one), last(other))
    lines = [line for line in logged(other) if line["kind"] == "train"]
    for a, b in zip(logged(one), lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_sharded_run_is_that_of_one_process(straight: Path, sharded: Path) -> None:
    assert_close_run(straight, sharded)


def test_replicas_with_shares_of_one_are_one_process(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    """Also where blocks are computed again in the backward pass."""
    how = "--strategy", "hsdp", "--shard-size", 1, "--recompute"
    two_ranks(cache, out := tmp_path / "run", *how, "--validate-every", 12)
    assert_close_run(straight, out)
    settings = tiny_run(cache, eval=Eval(loss=12, loss_images=8))
    (again,) = validating(settings, straight)(12, erw.load(straight), HERE)
    assert logged(out)[-1]["flow"] == pytest.approx(again["flow"], rel=1e-5)


def test_a_kill_in_an_asynchronous_save_leaves_the_checkpoint_before(
    cache: Path, sharded: Path, tmp_path: Path
) -> None:
    """And the same command ends with the same bits."""
    out, how = before_the_last(sharded, tmp_path / "run"), ("--strategy", "fsdp2")
    killed = "--die-in-checkpoint", 2  # the index is renamed first
    two_ranks(cache, out, *how, *killed, codes=[-signal.SIGKILL, 1])
    assert [path.name for path in paths(out / "checkpoints")] == ["step-00000008"]
    assert list((out / "checkpoints").glob(".step-00000012.part/shard-00002-*"))
    two_ranks(cache, out, *how)
    assert not list((out / "checkpoints").glob(".*"))
    assert_same_run(sharded, out)


def test_two_with_shares_go_on_from_a_file_and_one_from_their_shares(
    cache: Path, straight: Path, sharded: Path, tmp_path: Path
) -> None:
    two = before_the_last(straight, tmp_path / "two")
    how = "--strategy", "hsdp", "--shard-size", 2
    for rank in two_ranks(cache, two, *how, "--nan-after", 10, codes=[1, 1]):
        assert "not finite in step 11" in rank.err and "step-00000008" in rank.err
    two_ranks(cache, two, *how)
    assert_close_run(straight, two)

    one = before_the_last(sharded, tmp_path / "one")
    go(tiny_run(cache), one)
    assert_close_run(straight, one)
    assert [path.name for path in paths(one / "checkpoints")][-1] == "step-00000012.safetensors"


def test_shards_are_read_without_the_processes(sharded: Path, tmp_path: Path) -> None:
    """By `erw.load` and `erw convert`: the same bits as the first process gathered."""
    saved, weights = paths(sharded / "checkpoints")[-1], load_file(sharded / WEIGHTS)
    for model in (erw.load(saved), erw.load(sharded, checkpoint=12)):
        assert model.step == 12
        for name, p in model.net.named_parameters():
            assert torch.equal(p, weights[name]), name
    for source in (saved, sharded):
        convert(source, tmp_path / f"{source.name}.safetensors", to="repa")
    a, b = (load_file(tmp_path / f"{source.name}.safetensors") for source in (saved, sharded))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


SHARD = "shard-00002-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("file", "change"), [(SHARD, lose), (SHARD, flip), (INDEX, lose), (INDEX, flip)]
)
def test_a_run_goes_back_past_damaged_shards(
    cache: Path, sharded: Path, tmp_path: Path, file: str, change: Callable[[Path], None]
) -> None:
    out = shutil.copytree(sharded, tmp_path / "run")
    change(out / "checkpoints" / "step-00000012" / file)
    with pytest.raises(CheckpointError, match="step-00000012 is damaged"):
        erw.load(out, checkpoint=12)
    go(tiny_run(cache), out)
    assert_close_run(sharded, out)
    names = [path.name for path in paths(out / "checkpoints")]
    assert names == ["step-00000008", "step-00000012.safetensors"]


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """The mesh of a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# Importing `erw.sharding` asks for this, which pytest undoes.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_blocks_gathered_in_bf16_have_the_gradients_of_autocast(
    cache: Path, tmp_path: Path, alone: DeviceMesh
) -> None:
    """To the bit, of one or two micro-batches; blocks that did not run in warm-up too."""
    s = trainer(tiny_run(cache), tmp_path)
    other = build_network(s.run, s.dims)
    shard(other, alone, dtype=torch.bfloat16, trains=True)
    full = s.run.plan.warmup
    for step, parts in ((0, 2), (full, 1), (full, 2)):
        phase, batch, found = s.run.phase(step), s.read(step), []
        for net in (s.net, other):
            net.train_only(phase)
            for i in range(parts):
                lo, hi = 4 * i, 4 * i + 4
                rows, rng = batch.rows(slice(lo, hi)), Draws(0, step, lo, hi)
                with unsynced(net, last=i == parts - 1), torch.autocast("cpu", torch.bfloat16):
                    total(s.objective(net, rows, phase, rng), phase).backward()
            grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            found.append({name: whole(grad) for name, grad in grads.items()})
            net.zero_grad()
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())
        late = f"model.blocks.{s.run.model.depth - 1}.attn.qkv.weight"
        assert (late in found[1]) == (step > 0)
    block: Any = other.model.blocks[0]
    block.unshard()
    assert block.attn.qkv.weight.dtype == torch.bfloat16


def test_a_full_disk_is_told_when_the_save_is_waited_for(
    tmp_path: Path, alone: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver, path, said = Saver(), tmp_path / "step-00000004", list[Path]()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        saver.begin(path, {"a": torch.ones(3)}, {}, said.append)
        with pytest.raises(CheckpointError, match=r"step-00000004 \(.*No space left.*untouched"):
            saver.wait()
    assert not said and not path.exists()
    remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())
    saver.begin(path, {"a": torch.ones(3)}, {}, said.append)
    saver.wait()
    assert said == [path] and torch.equal(read(path)[0]["a"], torch.ones(3))


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="shard_size 3 does not divide 4 processes"):
        mesh_of(World(0, 4, torch.device("cpu")), Dist("hsdp", 3))
    with pytest.raises(ConfigError, match=r"is for dist\.strategy hsdp"):
        Dist("fsdp2", 2)
