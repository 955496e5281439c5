"""The models that evaluate compares, with their scores on validation and test."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.final_model.classifier import Scores
from pipeline.final_model.mixture import Mixture, cross_fitted, fit_mixture, mean_log
from pipeline.images.augment import Flips
from pipeline.images.shards import Images
from pipeline.inference.tta import TTA, logits_from
from pipeline.nets.checkpoint import refuse_other_classes
from pipeline.nets.network import Network, load
from pipeline.probing.codes import read_codes
from pipeline.probing.probes import Ints, Probe, read_probes
from pipeline.scoring.metrics import cross_entropy, judged_by
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Measure
from pipeline.statistics.verdict import first_unless_clearly_worse

BLEND = "blend"
SINGLE = ("probe", "stage1", "stage2")
# Of the candidates that validation can't tell apart, the first one is the final model: the blend
# was best in the mean of eight data sets, then stage 2 (docs/results.md).
TRUSTED = (BLEND, *reversed(SINGLE))


@dataclass(frozen=True)
class Scored:
    """A model of an earlier stage, with its scores (N, C) on validation and test."""

    name: str
    network: Network | None  # None: the network of the codes, built only for the final model
    probe: Probe | None
    tta: TTA
    val: Scores
    test: Scores
    training: dict[str, Any]  # results of training, from the checkpoint's metadata


@dataclass(frozen=True)
class Candidate:
    """A model that may become the final one: one of an earlier stage, calibrated, or their mixture.

    All are log probabilities (N, C). Those of validation are of fits to other groups of images.
    """

    name: str
    members: Sequence[Scored]
    mixture: Mixture
    val: Scores
    test: Scores

    @classmethod
    def of(cls, name: str, members: Sequence[Scored], labels: Ints, groups: Ints) -> "Candidate":
        """Fit a mixture of models to the validation labels; one alone is only calibrated."""
        on_val, on_test = [m.val for m in members], [m.test for m in members]
        mixture = fit_mixture(on_val, labels)
        held_out = cross_fitted(on_val, labels, groups)
        return cls(name, members, mixture, held_out, mixture.log_probabilities(on_test))

    @property
    def training(self) -> dict[str, Any]:
        """Return the results of training, if it is one model."""
        return self.members[0].training if len(self.members) == 1 else {}

    def uncalibrated(self, split: Literal["val", "test"]) -> Scores:
        """Return the log probabilities (N, C) if no temperature is applied."""
        scores = [getattr(member, split) for member in self.members]
        return mean_log(scores, self.mixture.weights, [1.0] * len(scores))


def candidates_of(
    models: Sequence[Scored], names: Sequence[str], labels: Ints, groups: Ints
) -> dict[str, Candidate]:
    """Return each model as a candidate, and the blend of those that are named if it is named too.

    `labels` and `groups` (N,) are those of the validation images.
    """
    found = {m.name: Candidate.of(m.name, [m], labels, groups) for m in models}
    if BLEND in names:
        # The most trained network comes first: another run may start from it.
        blended = [m for name in reversed(SINGLE) for m in models if m.name == name in names]
        found[BLEND] = Candidate.of(BLEND, blended, labels, groups)
    return found


def choose(
    found: dict[str, Candidate],
    names: Sequence[str],
    labels: Ints,
    groups: Ints,
    tie: float,
    measure: Measure = "accuracy",
) -> Candidate:
    """Return the final model: the most trusted one that is named, unless it is clearly worse."""
    asked = [found[name] for name in TRUSTED if name in names]
    values = [judged_by(measure, candidate.val, labels)[1] for candidate in asked]
    losses = [cross_entropy(candidate.val, labels) for candidate in asked]
    return asked[first_unless_clearly_worse(values, groups, tie, losses)]


def scored(
    both: Sequence[Images],
    features: Path,
    probe: Path,
    stages: tuple[Path, Path],
    views: int,
    classes: Sequence[str],
    resume: Resume,
) -> list[Scored]:
    """Score the best probe, the linear probe, stage 1 and stage 2 on validation and test.

    The networks' scores are averaged over `views` of the flips that stage 1 trained with.

    Raises CheckpointError if a checkpoint is not stage 1's, or is of other classes.
    """
    winner, linear, of_codes = read_probes(probe)
    probes = {"probe": winner, "probe_linear": linear}
    files = dict(zip(("stage1", "stage2"), stages, strict=True))
    return [
        *_probes(both, features, probes, TTA(**of_codes["viewing"]), len(classes)),
        *_networks(both, files, views, resume, classes),
    ]


def _probes(
    both: Sequence[Images], features: Path, probes: dict[str, Probe], tta: TTA, n_classes: int
) -> Iterator[Scored]:
    """Score the probes on codes that are averaged over the views of `tta`."""
    for name, probe in probes.items():

        def score(split: str, images: Images, probe: Probe = probe) -> Scores:
            return probe.scores(read_codes(features, split, probe.depth))

        yield Scored(name, None, probe, tta, *_on_both(both, score, n_classes), {})


def _networks(
    both: Sequence[Images],
    files: dict[str, Path],
    views: int,
    resume: Resume,
    classes: Sequence[str],
) -> Iterator[Scored]:
    """Score stages 1 and 2, averaged over the flips that stage 1 trained with."""
    loaded = {name: load(file) for name, file in files.items()}
    tta = TTA(_flips(files["stage1"], loaded["stage1"][1]), views)
    for name, (network, meta) in loaded.items():
        refuse_other_classes(name, files[name], network.classes, classes)

        def score(
            split: str, images: Images, name: str = name, network: Network = network
        ) -> Scores:
            def compute(first: int) -> Iterator[Sequence[Scores]]:
                return logits_from(network, images, tta, first)

            (scores,) = resume.filled([f"{name}-{split}"], len(images), compute)
            return scores

        training = {key: meta.get(key) for key in ("epoch", "train_accuracy")}
        yield Scored(name, network, None, tta, *_on_both(both, score, len(classes)), training)


def _on_both(
    both: Sequence[Images], score: Callable[[str, Images], Scores], n_classes: int
) -> tuple[Scores, Scores]:
    """Score the validation split and the test split, which may be empty."""
    val, test = both
    no_scores = np.empty((0, n_classes))
    return score("val", val), score("test", test) if len(test) else no_scores


def _flips(file: Path, meta: dict[str, Any]) -> Flips:
    """Return the flips that stage 1 trained with, from its checkpoint's metadata."""
    if "flips" not in meta:
        raise CheckpointError(f"{file}: not a checkpoint of stage 1; run `dvc repro stage1`")
    flips: Flips = meta["flips"]
    return flips
