"""Draws against SplitMix64's published numbers and the distributions that they are of."""

import pytest
import torch

from erw.rng import Draws, odd, seeded, signed, splitmix


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)),
        (1234567, (6457827717110365317, 3203168211198807973, 9817491932198370423)),
    ],
)
def test_words_are_those_of_splitmix64(seed: int, words: tuple[int, ...]) -> None:
    """The generator's published first numbers, for the gamma that it is known by."""
    found = splitmix(torch.arange(3), seed, 0x9E3779B97F4A7C15)
    assert found.tolist() == [signed(word) for word in words]


def test_gammas_are_odd_and_irregular() -> None:
    for bits in (0, 1, 0xFF, (1 << 63) - 1, seeded(0, "a")):
        gamma = odd(bits)
        assert gamma % 2 == 1 and 0 < gamma < 1 << 64
        assert bin(gamma ^ gamma >> 1).count("1") >= 24


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
