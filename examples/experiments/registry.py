"""The registered experiments: which arms, which seeds, and from which network each starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .options import Options


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    Args:
        name: unique in its experiment.
        options: of its runs, but for the seed and for where things lie.
        start: "EXPERIMENT/ARM" whose network it starts from, of the same seed, or of that modulo `start_seeds`.
        start_seeds: how many seeds the start has; 0 for as many as this arm.
        kept: whether its networks are kept with the results, for others to start from.
    """

    name: str
    options: Options
    start: str = ""
    start_seeds: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared seed by seed.

    Args:
        name: also its folder of results.
        title: of its table.
        arms: in the order in which they are run.
        seeds: runs of each arm: 0, 1, ...
        references: arms from which the others' differences are shown.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: int
    references: tuple[str, ...] = ("plain",)

    @property
    def starts(self) -> int:
        """How many networks all seeds start from; 0 if each seed has its own."""
        return max(arm.start_seeds for arm in self.arms)


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed."""

    experiment: Experiment
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """How the run is called in messages."""
        return f"{self.experiment.name}/{self.arm.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """The path of its files, without ending, in a folder of results."""
        return path_of(f"{self.experiment.name}/{self.arm.name}", self.seed)

    @property
    def failed_key(self) -> str:
        """The same of the file that says that it diverged."""
        return f"{self.key}.failed"

    @property
    def options(self) -> Options:
        """The options of the run, but for where things lie."""
        return replace(self.arm.options, seed=self.seed)

    @property
    def start_key(self) -> str:
        """The path of the network that it starts from; empty if it starts from scratch."""
        seeds = self.arm.start_seeds or self.seed + 1
        return path_of(self.arm.start, self.seed % seeds) if self.arm.start else ""


def path_of(arm: str, seed: int) -> str:
    """Return where an arm's files lie: "scratch/lstm, random" with seed 0 is scratch/lstm-random-0."""
    experiment, _, name = arm.rpartition("/")
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return f"{experiment}/{'-'.join(words)}-{seed}"


def jobs(experiments: Iterable[Experiment], seeds: int | None = None) -> Iterator[Job]:
    """Yield all runs seed by seed, so that whole pairs exist early."""
    chosen = list(experiments)
    counts = [min(experiment.seeds, seeds or experiment.seeds) for experiment in chosen]
    for seed in range(max(counts)):
        for experiment, count in zip(chosen, counts, strict=True):
            for arm in experiment.arms:
                if seed < count:
                    yield Job(experiment, arm, seed)


CIFAR = Options(dataset="cifar10", recipe="short", channels_last=True)
# Of a trained network that is trained on.
TUNED = replace(CIFAR, epochs=5, rate=CIFAR.plan().rate / 10)
# As many parameters as the ResNet-20 with LSTM to within 2 %: 17 instead of 16 channels.
WIDER = 17
# What an epoch with LSTM takes, in plain epochs: 1.8 on a processor with AVX-512.
LONGER = 1.8


def scratch() -> Experiment:
    """From scratch, the paper's Table III."""
    epochs = CIFAR.plan().epochs
    longer = f"plain, {round(LONGER * epochs)} epochs"
    arms = (
        Arm("plain", CIFAR, kept=True),
        Arm("lstm, random", replace(CIFAR, cell="lstm", init="random")),
        Arm("lstm, identity", replace(CIFAR, cell="lstm", init="identity")),
        Arm("gru, random", replace(CIFAR, cell="gru", init="random")),
        Arm(f"plain, width {WIDER}", replace(CIFAR, width=WIDER)),
        Arm(longer, replace(CIFAR, epochs=round(LONGER * epochs))),
    )
    return Experiment("scratch", "From scratch, all 50,000 images of CIFAR-10", arms, 3, ("plain", longer))


def retrofit() -> Experiment:
    """Return a trained network trained on: as it is, or regulated."""
    start = "scratch/plain"
    longer = f"plain, {round(LONGER * 5)} epochs"
    plain = (Arm("plain", TUNED, start), Arm(longer, replace(TUNED, epochs=round(LONGER * 5)), start))
    regulated = tuple(
        Arm(
            f"{cell}, {fusion}{', frozen' if frozen else ''}",
            replace(TUNED, cell=cell, fusion=fusion, init="identity", frozen=frozen),
            start,
        )
        for frozen in (False, True)
        for cell in ("lstm", "gru")
        for fusion in ("paper", "residual")
    )
    title = "Retrofit: the plain networks of the table above, trained on"
    return Experiment("retrofit", title, (*plain, *regulated), 3, ("plain", longer))


def clipped() -> Experiment:
    """Retrofit with clipped gradients, since one broke without."""
    plain = replace(TUNED, clip=1.0)
    lstm = replace(plain, cell="lstm", fusion="residual", init="identity")
    arms = (
        Arm("plain", plain, "scratch/plain"),
        Arm("lstm, residual", lstm, "scratch/plain"),
        Arm("lstm, residual, frozen", replace(lstm, frozen=True), "scratch/plain"),
    )
    return Experiment("clipped", "Retrofit with clipped gradients", arms, 3)


def transfer(images: int, epochs: int) -> Experiment:
    """Return the CIFAR-10 networks fine-tuned on a few images of Fashion-MNIST."""
    base = Options(
        dataset="fashion_mnist",
        like="cifar10",
        subset=images,
        recipe="short",
        epochs=epochs,
        batch=64,
        rate=CIFAR.plan().rate / 10,
        new_head=True,
        channels_last=True,
        test_every=epochs,
    )
    lstm = replace(base, cell="lstm", init="identity")
    arms = tuple(
        Arm(name, options, "scratch/plain", start_seeds=3)
        for name, options in (
            ("plain", base),
            ("lstm", lstm),
            ("lstm in the last stage", replace(lstm, stages=(2,))),
        )
    )
    return Experiment(f"transfer-{images}", f"Transfer to {images:,} images of Fashion-MNIST", arms, 10)


def places() -> Experiment:
    """Where the regulator sits and which kernel it has, the paper's Tables I and V."""
    base = replace(CIFAR, subset=10_000, epochs=20, test_every=5)
    arms = tuple(
        Arm(
            f"lstm, {kernel}, {'all stages' if stage is None else f'stage {stage}'}",
            replace(base, cell="lstm", init="random", kernel=kernel, stages=None if stage is None else (stage,)),
        )
        for kernel in ("light", "dense")
        for stage in (None, 0, 1, 2)
    )
    return Experiment("places", "Where and which, 10,000 images of CIFAR-10", (Arm("plain", base), *arms), 3)


def paper(depth: int) -> Experiment:
    """Table III with the paper's own recipe; for a GPU."""
    base = Options(dataset="cifar10", recipe="paper", model=f"resnet{depth}", channels_last=True, test_every=10)
    cells = (Arm(f"{cell}, random", replace(base, cell=cell, init="random")) for cell in ("gru", "lstm"))
    title = f"ResNet-{depth} from scratch with the paper's recipe, CIFAR-10"
    return Experiment(f"paper-{depth}", title, (Arm("plain", base), *cells), 3)


def why() -> Experiment:
    """Return what the start, the fusion's norm and ReLU and the rate do: an exploration."""
    base = replace(CIFAR, subset=5_000, epochs=20, test_every=5)
    lstm = replace(base, cell="lstm", init="random")
    starts = tuple(Arm(f"lstm, {init}", replace(lstm, init=init)) for init in ("random", "identity", "unit"))
    fusions = (
        Arm("lstm, random, no norm", replace(lstm, norm="none")),
        Arm("lstm, random, neither norm nor relu", replace(lstm, fusion="residual", norm="none")),
        Arm("lstm, random, residual", replace(lstm, fusion="residual")),
    )
    rates = tuple(
        Arm(f"{name}, rate {rate:g}", replace(options, rate=rate))
        for rate in (0.05, 0.1, 0.4)
        for name, options in (("plain", base), ("lstm, random", lstm))
    )
    title = "Why: exploration on 5,000 images of CIFAR-10"
    return Experiment("why", title, (Arm("plain", base), *starts, *fusions, *rates), 3)


def smoke() -> Experiment:
    """Two minutes on scikit-learn's digits: whether everything runs, no evidence."""
    base = Options(subset=200, epochs=4, recipe="digits")
    lstm = replace(base, cell="lstm")
    arms = (Arm("plain", base, kept=True), Arm("lstm", lstm), Arm("lstm, retrofit", lstm, "smoke/plain"))
    return Experiment("smoke", "Smoke test on digits", arms, 2)


_ALL = (
    scratch(),
    retrofit(),
    clipped(),
    transfer(1_000, 30),
    transfer(5_000, 10),
    places(),
    why(),
    paper(20),
    paper(32),
    paper(56),
    smoke(),
)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
