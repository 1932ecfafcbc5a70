"""The sizes of a study: frozen values, one a name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from erw.config import Run, nearest
from erw.errors import ConfigError
from erw.recipes import recipe, tiny
from erw.records import above_zero, at_least, finite
from erw.sampling.solvers import check_solver

METHODS = (("sit", "quickstart_sit"), ("repa", "quickstart_repa"), ("erw", "quickstart"))


@dataclass(frozen=True)
class StudyPlan:
    """Methods compared at equal total FLOPs on the built-in images.

    Attributes:
        name, title: what it is called.
        steps: full steps of the first method that set the budget; None: as many as `hours` allow.
        hours: the time that the whole study may take, where `steps` is None.
        methods: (method, recipe) pairs; the first one's full steps are the unit of the budget.
        seeds: each method is trained once with each.
        fractions: shares of the budget at which a method is scored; the last is 1.
        train_images, reference_images: prepared for training, held out for scoring.
        samples: images drawn at each point, with the seeds 0 to samples - 1.
        solver, sample_steps, guidance: how they are drawn, the same for all.
        image_size, vae, encoder: of the cache.
        small: True: every recipe's tiny twin, for a check of the machinery alone.
    """

    name: str
    title: str = "Quickstart study"
    steps: int | None = 1200
    hours: float | None = None
    methods: tuple[tuple[str, str], ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    train_images: int = 8192
    reference_images: int = 2000
    samples: int = 500
    solver: str = "adams"
    sample_steps: int = 12
    guidance: float = 1.0
    image_size: int = 64
    vae: str = "openmoji-f4c4"
    encoder: str = "efficientnet-lite0"
    small: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) is (self.hours is None):
            raise ConfigError(f"study {self.name}: give either steps or hours, not both or neither")
        rising = all(a < b for a, b in zip(self.fractions, self.fractions[1:], strict=False))
        if not self.fractions or not rising or self.fractions[0] <= 0 or self.fractions[-1] != 1:
            raise ConfigError(
                f"study {self.name}: fractions {self.fractions} must rise from above 0 to 1"
            )
        if self.steps is not None:
            at_least("study", "steps", self.steps, 1)
        if self.hours is not None:
            above_zero("study", "hours", self.hours)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study {self.name}: seeds {self.seeds}; give each once")
        check_solver(self.solver, "flow")
        finite("study", "guidance", self.guidance)
        for name in ("train_images", "reference_images", "samples", "sample_steps"):
            if getattr(self, name) < 2:
                raise ConfigError(
                    f"study {self.name}: {name} is {getattr(self, name)}; expected 2 or more"
                )

    def run(self, method: str, *, seed: int, cache: str) -> Run:
        """The run of a method before its number of steps is known."""
        found = recipe(dict(self.methods)[method])
        if self.small:
            # A little more than tiny: else the teacher alone would cost more than the budget.
            found = tiny(found)
            model = dataclasses.replace(found.model, width=64)
            found = found.replace(model=model, data=dataclasses.replace(found.data, batch_size=32))
        return found.replace(seed=seed, data=dataclasses.replace(found.data, cache=cache))


ABLATIONS = (
    ("repa_stopped", "quickstart_repa_stopped"),
    ("erw_paper", "quickstart_paper"),
)

DEMO = StudyPlan(name="demo", steps=900)
"""At most 15 minutes on 2 CPU cores."""

SMOKE = StudyPlan(
    name="smoke",
    title="Smoke test of the quickstart study",
    steps=60,
    fractions=(0.5, 1.0),
    train_images=256,
    reference_images=128,
    samples=64,
    sample_steps=4,
    small=True,
)
"""The same with tiny networks in about a minute: says that it works, nothing about methods."""

FULL = StudyPlan(
    name="full",
    steps=None,
    hours=3.0,
    seeds=(0, 1, 2),
    fractions=tuple(k / 6 for k in range(1, 7)),
    train_images=16_384,
    samples=2000,
)
"""Three seeds a method, sized to three hours of whatever machine it starts on."""

VARIANTS = dataclasses.replace(
    FULL,
    name="variants",
    title="Variants of the quickstart study",
    methods=(METHODS[0], *ABLATIONS),
    seeds=(0,),
)
"""REPA with an early stop, and ERW as the paper has it, beside SiT."""

STUDIES = {study.name: study for study in (DEMO, SMOKE, FULL, VARIANTS)}


def study_plan(name: str) -> StudyPlan:
    """The study of that name. Raises ConfigError if there is none, with the nearest."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{nearest(name, STUDIES)}")
    return STUDIES[name]
