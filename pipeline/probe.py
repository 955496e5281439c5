"""Probe: linear, LDA and SVM classifiers on the codes, chosen by cross-validation on train.

Of the cells whose measure is within a standard error of the best, the one with the lowest
cross-entropy of the out-of-fold predictions is chosen: on a few hundred images, a smaller lead in
accuracy is mostly luck.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

# probing/probes.py imports these late. Threads that import a module at once may see half of it.
import sklearn.linear_model
import sklearn.svm  # noqa: F401
from annotated_types import Ge, Gt, Interval, MinLen
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits

from pipeline.images.rows import Rows
from pipeline.probing.codes import JOIN, LAST, SOURCE, read_codes, read_feature_facts, read_labels
from pipeline.probing.probes import (
    FITS,
    KINDS,
    Floats,
    Ints,
    Kind,
    Probe,
    Scaler,
    class_scores,
    fit_svm,
    gram,
    linear_probe,
    save_probes,
    svm_probe,
    unit,
)
from pipeline.scoring.answers import Sureness, answer_lines
from pipeline.scoring.metrics import (
    MEASURES,
    by_image,
    cross_entropy,
    fit_temperature,
    validation,
)
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.files import write_csv, write_json
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Key, Measure, Out, Seed
from pipeline.stage_runtime.settings import threads

Positive = Annotated[float, Gt(0)]
ROUNDING = 1e-12  # of a difference of two measures


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: a kind of probe at a depth with a regularisation C."""

    kind: Kind
    depth: str
    c: float  # of lda, the shrinkage
    loss: float  # cross-entropy of the held-out images, calibrated by one temperature
    accuracies: list[float]  # one per fold
    measured: list[float] | None = None  # one per fold; none if the loss alone decides

    @property
    def accuracy(self) -> float:
        """Return the mean accuracy over the folds."""
        return float(np.mean(self.accuracies))


def probe(
    *,
    features: Path,
    out: Out,
    kinds: Annotated[list[Literal["linear", "lda", "svm_linear", "svm_rbf"]], MinLen(1)],
    linear_c: Annotated[list[Positive], MinLen(1)],
    lda_shrinkage: Annotated[list[Annotated[float, Interval(gt=0, le=1)]], MinLen(1)],
    svm_linear_c: Annotated[list[Positive], MinLen(1)],
    svm_rbf_c: Annotated[list[Positive], MinLen(1)],
    join: Annotated[int, Ge(0)],
    l2: bool,
    folds: Annotated[int, Interval(ge=2, le=20)],
    svm_max_images: Annotated[int, Interval(ge=10, le=50_000)],
    sample_weight: Annotated[bool, Key("sample_weight")],
    class_weight: Annotated[Literal["none", "balanced"], Key("class_weight")],
    measure: Annotated[Measure, Key("measure")],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Search depth x C x kind by cross-validation on train; fit the best and the linear probe.

    The concatenated codes of the `join` deepest blocks are one more depth.

    Writes probe.safetensors (the winner, and the linear probe on the last codes), grid.csv,
    metrics.json and out_of_fold.csv, the out-of-fold predictions of both probes.

    Raises DataError if a class has fewer images than folds.
    """
    facts = read_feature_facts(features)
    train, val = read_labels(features, "train"), read_labels(features, "val")
    _refuse_few(train, facts["classes"], folds)
    weights = train.weights if sample_weight else np.ones(len(train.labels))
    balance = None if class_weight == "none" else class_weight
    some = _subsample(train.labels, svm_max_images, seed)
    if len(some) < len(train.labels):
        say(f"SVMs are fitted on {len(some)} of {len(train.labels)} images (probe.svm_max_images)")

    with threadpool_limits(1, "blas"), warnings.catch_warnings():
        # Cells with almost no regularisation may stop before they converge; they are kept as is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        grid = {
            **{"linear": linear_c, "lda": lda_shrinkage},
            **{"svm_linear": svm_linear_c, "svm_rbf": svm_rbf_c},
        }
        search = _Search(train, weights, balance, folds, seed, some, grid, l2, measure)
        cells: list[Cell] = []
        depths = [*facts["depths"], *_joined(facts["depths"], join)]
        tasks = [(kind, depth) for depth in depths for kind in ("linear", *kinds)]
        tasks = [(k, d) for k, d in dict.fromkeys(tasks) if k in kinds or d == LAST]

        def searched(task: tuple[Kind, str]) -> list[Cell]:
            kind, depth = task

            def searched_anew() -> list[dict[str, Any]]:
                codes = read_codes(features, "train", depth)
                return [asdict(cell) for cell in search.cells(kind, depth, codes)]

            return [Cell(**c) for c in resume.remember(f"{kind} on {depth}", searched_anew)]

        # Threads suffice: BLAS and libsvm, which take most of the time, release the GIL.
        with ThreadPoolExecutor(threads()) as pool:
            for found in track(pool.map(searched, tasks), len(tasks), "probe"):
                cells += found
        if measure != "log_loss" and any(cell.measured is None for cell in cells):
            say(f"a fold lacks a class, so {MEASURES[measure]} isn't defined: log loss decides")
        best = best_cell([cell for cell in cells if cell.kind in kinds])
        best_linear = best_cell([c for c in cells if c.kind == "linear" and c.depth == LAST])
        linear = search.fit(best_linear, read_codes(features, "train", LAST))
        held_out_linear = search.held_out(best_linear, read_codes(features, "train", LAST))
        winner, held_out = linear, held_out_linear
        if best != best_linear:
            codes = read_codes(features, "train", best.depth)
            winner, held_out = search.fit(best, codes), search.held_out(best, codes)

    scores = {
        name: p.scores(read_codes(features, "val", p.depth))
        for name, p in (("winner", winner), ("linear", linear))
    }
    temperature = fit_temperature(scores["winner"], val.labels)
    of_linear = validation(scores["linear"], val.labels, 1.0, measure)
    of_measure = {} if best.measured is None else {f"cv_{measure}": float(np.mean(best.measured))}
    metrics = {
        "val": validation(scores["winner"], val.labels, temperature, measure),
        **of_measure,
        "cv_accuracy": best.accuracy,
        "linear_cv_accuracy": best_linear.accuracy,
        "linear_val_accuracy": of_linear["accuracy"],
        "svm_images": len(some),
    }
    save_probes(out / "probe.safetensors", winner, linear, {**facts, "val": of_linear})
    write_csv(out / "grid.csv", _grid(cells, measure))
    seen = ~np.isnan(held_out[:, 0])
    out_of_fold = {"probe": held_out, "probe_linear": held_out_linear}
    of_winner = fit_temperature(held_out[seen], train.labels[seen])
    calibrated, raw = (log_softmax(held_out / t, axis=1) for t in (of_winner, 1.0))
    sureness = Sureness(held_out.argmax(1), calibrated, raw)
    answers = answer_lines(train, out_of_fold, "probe", sureness, facts["classes"])
    write_csv(out / "out_of_fold.csv", answers)
    write_json(out / "metrics.json", {"probe": metrics})
    for name, cell, s in (
        ("winner", best, scores["winner"]),
        ("linear", best_linear, scores["linear"]),
    ):
        accuracy = (s.argmax(1) == val.labels).mean()
        say(
            f"{name:<16} {cell.kind} on {cell.depth}, "
            f"{'shrinkage' if cell.kind == 'lda' else 'C'} {cell.c:g}: "
            f"cross-validation {cell.accuracy:.4f} (loss {cell.loss:.4f}), "
            f"validation {accuracy:.4f}"
        )
    return {}


def best_cell(cells: list[Cell]) -> Cell:
    """Return the cell with the lowest loss of those that tie with the best by the measure.

    Two cells tie if their difference over the folds is within its standard error. Of equal losses,
    the simpler kind counts, then the smaller C.
    """
    measured = [np.array(cell.measured) for cell in cells if cell.measured is not None]
    if len(measured) == len(cells):
        best = max(measured, key=lambda values: float(values.mean()))
        cells = [cell for cell, v in zip(cells, measured, strict=True) if _ties(best - v)]
    return min(cells, key=lambda cell: (cell.loss, KINDS.index(cell.kind), cell.c))


def _ties(lead: Floats) -> bool:
    """Return whether a lead, by fold, is within its standard error."""
    return bool(lead.mean() <= lead.std(ddof=1) / np.sqrt(len(lead)) + ROUNDING)


class _Search:
    """Cross-validation in which the cells share folds, scaling and kernels."""

    def __init__(
        self,
        train: Rows,
        weights: Floats,
        balance: str | None,
        folds: int,
        seed: int,
        some: Ints,
        grid: dict[str, list[float]],
        l2: bool,
        measure: Measure,
    ) -> None:
        self.labels, self.groups, self.weights = train.labels, train.groups, weights
        self.balance, self.folds, self.seed, self.some = balance, folds, seed, some
        self.grid, self.n_classes, self.l2 = grid, int(train.labels.max()) + 1, l2
        self.measure: Measure = measure

    def cells(self, kind: Kind, depth: str, codes: Any) -> Iterator[Cell]:
        """Cross-validate one kind at one depth for each C, in ascending order.

        For a linear probe, the search stops at the first C that is worse than the one before: the
        solver takes more steps the weaker the regularisation.
        """
        before = np.inf
        for c, scores, folds in self._held_out(kind, depth, codes, sorted(self.grid[kind])):
            y = self.labels[self.rows(kind)]
            temperature = fit_temperature(scores, y)
            loss = cross_entropy(scores, y, temperature)
            right = scores.argmax(1) == y
            accuracies = [float(right[held].mean()) for held in folds]
            measured = self._measured(scores / temperature, y, folds)
            yield Cell(kind, depth, c, loss, accuracies, measured)
            if kind == "linear" and loss > before:
                return
            before = loss

    def _measured(self, scores: Floats, y: Ints, folds: list[Ints]) -> list[float] | None:
        """Return the measure of each fold; none if the loss decides, or if a fold lacks a class."""
        if self.measure == "log_loss":
            return None
        values = [by_image(self.measure, scores[held], y[held]) for held in folds]
        found = [float(of_fold.mean()) for of_fold in values if of_fold is not None]
        return found if len(found) == len(folds) else None

    def held_out(self, cell: Cell, codes: Any) -> Floats:
        """Return the out-of-fold scores of the training images, (N, C); NaN if in no fold."""
        scores = np.full((len(self.labels), self.n_classes), np.nan)
        ((_, found, _),) = self._held_out(cell.kind, cell.depth, codes, [cell.c])
        scores[self.rows(cell.kind)] = found
        return scores

    def rows(self, kind: Kind) -> Ints:
        """List the training images that a kind of probe is fitted on."""
        return np.arange(len(self.labels)) if kind in FITS else self.some

    def _held_out(
        self, kind: Kind, depth: str, codes: Any, grid: Sequence[float]
    ) -> Iterator[tuple[float, Floats, list[Ints]]]:
        """Yield each C with the out-of-fold scores and the folds.

        The scaling is fitted on all of train, as it uses no labels. SVMs of all C share one kernel;
        a linear probe starts from the solution for the previous C, and LDA from its moments.
        """
        x, y, weights, groups = self._data(kind, self._scaled(kind, depth, codes))
        kernel = None if kind in FITS else gram(x, x, kind, 1 / x.shape[1])
        cuts = list(self._folds(y, groups))
        fitted: list[Any] = [None] * len(cuts)
        for c in grid:
            scores = np.empty((len(y), self.n_classes))
            for i, (fit_on, held_out) in enumerate(cuts):
                of_fold = y[fit_on], weights[fit_on]
                if kernel is None:
                    fitted[i] = FITS[kind](x[fit_on], *of_fold, c, self.balance, fitted[i])
                    unseen = x[held_out]
                else:
                    fitted[i] = fit_svm(kernel[np.ix_(fit_on, fit_on)], *of_fold, c, self.balance)
                    unseen = kernel[np.ix_(held_out, fit_on)]
                scores[held_out] = class_scores(fitted[i], unseen, self.n_classes)
            yield c, scores, [held for _, held in cuts]

    def fit(self, cell: Cell, codes: Any) -> Probe:
        """Fit a cell's probe on all of train."""
        scaled = self._scaled(cell.kind, cell.depth, codes)
        x, y, weights, _ = self._data(cell.kind, scaled)
        scaler, l2 = Scaler.fit(scaled), scaled is not codes
        if cell.kind in FITS:
            fitted = FITS[cell.kind](x, y, weights, cell.c, self.balance)
            return linear_probe(fitted, scaler, cell.depth, l2, cell.c, cell.kind)
        gamma = 1 / x.shape[1]
        svm = fit_svm(gram(x, x, cell.kind, gamma), y, weights, cell.c, self.balance)
        return svm_probe(svm, x, scaler, cell.depth, cell.kind, gamma, l2)

    def _scaled(self, kind: Kind, depth: str, codes: Any) -> Any:
        # The linear probe on the last codes becomes a head, which can't normalise its input.
        is_head = kind == "linear" and depth == LAST
        return unit(codes) if self.l2 and not is_head else codes

    def _data(self, kind: Kind, codes: Any) -> tuple[Floats, Ints, Floats, Ints]:
        rows = self.rows(kind)
        x = Scaler.fit(codes)(codes[rows])
        return x, self.labels[rows], self.weights[rows], self.groups[rows]

    def _folds(self, y: Ints, groups: Ints) -> Iterator[tuple[Ints, Ints]]:
        if len(np.unique(groups)) < len(groups):
            cut = StratifiedGroupKFold(self.folds, shuffle=True, random_state=self.seed)
            yield from cut.split(y, y, groups)
        else:
            yield from StratifiedKFold(self.folds, shuffle=True, random_state=self.seed).split(y, y)


def _joined(depths: list[str], join: int) -> list[str]:
    """Return the name of the deepest blocks' concatenated codes; none for fewer than two."""
    deepest = [d for d in depths if d not in (LAST, SOURCE)][-join:] if join else []
    return [JOIN.join(deepest)] if len(deepest) > 1 else []


def _refuse_few(train: Rows, classes: list[str], folds: int) -> None:
    counts = np.bincount(train.labels, minlength=len(classes))
    if counts.min() < folds:
        raise DataError(
            f"class {classes[int(counts.argmin())]!r} has {counts.min()} training images, fewer "
            f"than probe.folds = {folds}; add images or lower probe.folds"
        )
    for label, name in enumerate(classes):
        n_groups = len(np.unique(train.groups[train.labels == label]))
        if n_groups < folds:
            raise DataError(
                f"class {name!r} has training images in {n_groups} group(s), fewer than "
                f"probe.folds = {folds}; lower probe.folds, or set prepare.split_by: image"
            )


def _subsample(labels: Ints, most: int, seed: int) -> Ints:
    """Choose at most `most` rows, in order: each class by its share, and at least once."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    # The k-th image of a class of n comes at (k + 1/2) / n: every prefix is stratified.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return np.sort(np.argsort(place, kind="stable")[:most])


def _grid(cells: list[Cell], measure: Measure) -> Iterator[tuple[str, ...]]:
    own = measure not in ("accuracy", "log_loss")
    more = (measure, f"{measure}_std") if own else ()
    yield "kind", "depth", "c", "loss", "accuracy", "accuracy_std", *more
    for cell in cells:
        numbers = [cell.loss, cell.accuracy, np.std(cell.accuracies)]
        if own and cell.measured:
            numbers += [np.mean(cell.measured), np.std(cell.measured)]
        blank = ("", "") if own and not cell.measured else ()
        texts = (f"{number:.6f}" for number in numbers)
        yield cell.kind, cell.depth, f"{cell.c:g}", *texts, *blank
