"""The loader: a shuffled stream that is a pure function of seed and position."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erw.data import Cache, Loader, prefetch
from erw.errors import CacheError
from helpers.parts import ENCODER, make, photos, vae_folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    root = tmp_path_factory.mktemp("loader")
    return make(photos(root / "set"), root / "c", vae_folder(root / "vae"), encoder=True, flip=True)


def test_each_epoch_shows_every_row_once_in_a_new_order(cache: Cache) -> None:
    loader = Loader(cache, seed=1)
    epochs = [loader.order(np.arange(24 * e, 24 * (e + 1)))[0].tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Loader(cache, seed=2).order(np.arange(24))[0].tolist() != epochs[0]


def test_every_row_is_equally_likely_at_every_place(cache: Cache) -> None:
    """Chi-square of the row at places 0 and 1 over many seeds; and do they keep their order?"""
    trials, number = 1500, len(cache)
    pairs = [Loader(cache, seed=seed).order(np.arange(2))[0] for seed in range(trials)]
    for place in (0, 1):
        counts = np.bincount([pair[place] for pair in pairs], minlength=number)
        chi = ((counts - trials / number) ** 2 / (trials / number)).sum()
        assert chi < number - 1 + 5 * np.sqrt(2 * (number - 1))
    rising = sum(bool(pair[0] < pair[1]) for pair in pairs)
    assert abs(rising - trials / 2) < 4 * np.sqrt(trials / 4)


def test_batches_straddle_epochs(cache: Cache) -> None:
    loader = Loader(cache, seed=3)
    long = loader.order(np.arange(100))[0]
    short = np.concatenate([loader.order(np.arange(s, s + 10))[0] for s in range(0, 100, 10)])
    assert np.array_equal(long, short)
    assert set(Counter(long[:96].tolist()).values()) == {4}


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_ranks_read_slices_of_one_batch(cache: Cache, start: int, count: int, ranks: int) -> None:
    loader = Loader(cache, seed=4, features=[ENCODER])
    whole = loader.batch(range(start, start + count))
    cuts = [count * r // ranks for r in range(ranks + 1)]
    parts = [loader.batch(range(start + a, start + b)) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat([p.mean for p in parts]), whole.mean)
    assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    assert torch.equal(torch.cat([p.features[0] for p in parts]), whole.features[0])


def test_history_and_prefetching_change_nothing(cache: Cache) -> None:
    loader = Loader(cache, seed=5, features=[ENCODER])

    def fetch(step: int) -> torch.Tensor:
        return loader.batch(range(step * 7, step * 7 + 7)).mean

    direct = [fetch(step) for step in reversed(range(9))][::-1]
    for depth, threads in (1, 1), (2, 2), (20, 5):
        ahead = list(prefetch(fetch, range(9), depth=depth, threads=threads))
        assert all(torch.equal(a, b) for a, b in zip(ahead, direct, strict=True))


def test_prefetch_passes_errors_on_and_stops_early() -> None:
    def fetch(step: int) -> int:
        if step == 3:
            raise CacheError("gone")
        return step

    stream = prefetch(fetch, range(10**9))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CacheError, match="gone"):
        next(stream)


def test_half_of_the_images_are_mirrored(cache: Cache) -> None:
    loader = Loader(cache, seed=6)
    assert abs(loader.order(np.arange(10_000))[1].mean() - 0.5) < 0.03
    rows, coins = loader.order(np.arange(48))
    same = (loader.batch(range(48)).mean == cache.read(rows).mean).flatten(1).all(1)
    assert np.array_equal(same.numpy(), ~coins)


def test_impossible_requests(cache: Cache) -> None:
    with pytest.raises(CacheError, match="not of dinov2-b"):
        Loader(cache, seed=0, features=["dinov2-b"])
