"""Studies by name: values, as recipes are."""

from dataclasses import dataclass, replace

from erw.config import Eval, Run
from erw.errors import ConfigError, nearest
from erw.recipes import recipe, tiny
from erw.settings import Settings, ranged

METHODS = (("SiT", "quickstart_sit"), ("REPA", "quickstart_repa"), ("ERW", "quickstart"))


@dataclass(frozen=True)
class Study(Settings):
    """Methods compared at equal total FLOPs on the built-in images."""

    name: str
    title: str = "Quickstart study"  # of its page
    methods: tuple[tuple[str, str], ...] = METHODS  # with recipes; the first's FLOPs are the budget
    steps: int = ranged(900, "[1, inf)")  # full steps of the first method
    seeds: tuple[int, ...] = (0,)  # each method is trained once with each
    points: int = ranged(4, "[1, inf)")  # scores of a run, after equal shares of the budget
    train_images: int = ranged(8192, "[2, inf)")  # prepared for training
    reference_images: int = ranged(2000, "[2, inf)")  # composed for scoring
    samples: int = ranged(500, "[2, inf)")  # that a score is of, the same seeds and labels for all
    small: bool = False  # every recipe's tiny twin, for a check of the machinery alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study.seeds {self.seeds}: give at least one, and each once")

    def run(self, method: str, *, seed: int, cache: str) -> Run:
        """The run of a method before its number of steps is known. Raises ConfigError."""
        run = recipe(dict(self.methods)[method])
        if self.small:
            # A little more than tiny: else the teacher alone would cost more than the budget.
            run = tiny(run)
            model, data = replace(run.model, width=64), replace(run.data, batch_size=32)
            run = run.replace(model=model, data=data)
        scored = Eval(samples=self.samples, reference_count=self.reference_images,
                      keep_best=False, loss_images=128)  # fmt: skip
        data = replace(run.data, cache=(cache,))
        return run.replace(name=method, seed=seed, data=data, eval=scored)


FULL = Study("full", steps=7500, seeds=(0, 1, 2), points=6, train_images=16_384, samples=2000)
_STOPPED = ("REPA, stopped", "quickstart_repa_stopped"), ("ERW as published", "quickstart_paper")
STUDIES = {
    "demo": Study("demo"),  # about 10 minutes on 2 CPU cores
    # The same with tiny networks in a minute: says that it works, nothing about methods.
    "smoke": Study(
        "smoke", "Smoke test of the quickstart study", steps=60, points=2, train_images=256,
        reference_images=128, samples=64, small=True,
    ),
    "full": FULL,  # about 6 hours on 2 CPU cores
    "variants": replace(
        FULL, name="variants", title="Variants of the quickstart study", seeds=(0,),
        methods=(METHODS[0], *_STOPPED),
    ),
}  # fmt: skip


def study_plan(name: str) -> Study:
    """The study of that name. Raises ConfigError if there is none, with the nearest."""
    if name not in STUDIES:
        raise ConfigError(f"no study {name!r}{nearest(name, STUDIES)}")
    return STUDIES[name]
