"""Draws against Random123's known answers and the distributions that they are of."""

import pytest
import torch

from erw.rng import Draws, philox

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, FULL << 32 | FULL, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # digits of pi
            0x299F31D0 << 32 | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: int, words: tuple[int, ...]
) -> None:
    a, b, c, d = (torch.tensor(word) for word in counter)
    assert tuple(map(int, philox((a, b, c, d), key))) == words


@pytest.mark.parametrize("name", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 5, 2)], ids=str)
def test_rows_are_those_of_the_global_batch(name: str, shape: tuple[int, ...]) -> None:
    whole = getattr(Draws(1, 2, 0, 8), name)("x", *shape)
    assert whole.shape == (8, *shape)
    assert whole.dtype == torch.float32
    assert torch.equal(getattr(Draws(1, 2, 3, 7), name)("x", *shape), whole[3:7])
    assert torch.equal(getattr(Draws(1, 2, 3, 7).rows(1, 3), name)("x", *shape), whole[4:6])


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_numbers_have_their_distribution(name: str) -> None:
    """Kolmogorov's distance to it is that of 2^18 independent numbers, below 1.63 / sqrt(n) in 99
    of 100 cases; other steps, seeds, names, rows and neighbours are not correlated with them."""
    x = getattr(Draws(1, 2, 0, 64), name)("x", 4096).double()
    n = x.numel()
    cdf = torch.special.ndtr(x) if name == "normal" else x
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (cdf.flatten().sort().values - steps).abs().max() < 1.63 / n**0.5
    assert cdf.min() >= 0 and cdf.max() < 1
    z = (x - x.mean()) / x.std()
    others = [Draws(1, 3, 0, 64), Draws(2, 2, 0, 64)]
    drawn = [getattr(draws, name)("x", 4096) for draws in others]
    drawn += [getattr(Draws(1, 2, 0, 64), name)("y", 4096), x.roll(1, 0), x.roll(1, 1)]
    for y in drawn:
        assert abs((z * (y - y.mean()) / y.std()).mean()) < 4 / n**0.5


def test_numbers_without_values_have_their_shape() -> None:
    assert Draws(0, 0, 0, 2, "meta").normal("x", 3).shape == (2, 3)
