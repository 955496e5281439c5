"""Probes on codes: fitting, scores from plain arrays, storage without pickle."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.special import logsumexp

from pipeline.nets import checkpoint
from pipeline.stage_runtime.errors import CheckpointError

if TYPE_CHECKING:
    # Takes a second to import, and isn't needed to read a probe.
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Kind = Literal["linear", "lda", "svm_linear", "svm_rbf"]
KINDS: tuple[Kind, ...] = ("linear", "lda", "svm_linear", "svm_rbf")  # from simple to flexible
SHARPNESS = 6.0  # slope of the sigmoids over an SVM's decision values; 4 to 8 do as well on digits
AT_ONCE = 4_000_000  # decision values in memory
GRADIENT, STEPS = 1e-6, 20_000  # where a logistic regression stops: largest gradient, iterations


@dataclass(frozen=True)
class Scaler:
    """Standardisation of codes; mean and scale are (D,)."""

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, codes: NDArray[Any]) -> "Scaler":
        """Fit to codes (N, D); a constant feature is only centred."""
        scale = codes.std(0, dtype=np.float64)
        return cls(codes.mean(0, dtype=np.float64), np.where(scale > 1e-12, scale, 1.0))

    def __call__(self, codes: NDArray[Any]) -> Floats:
        """Standardise codes (N, D)."""
        return np.asarray((codes - self.mean) / self.scale, np.float64)


@dataclass(frozen=True)
class Probe:
    """A fitted probe as plain arrays."""

    kind: Kind
    depth: str
    c: float  # of lda, the shrinkage
    gamma: float  # of the RBF kernel; 0 otherwise
    l2: bool  # codes are scaled to unit length before they are standardised
    arrays: dict[str, NDArray[Any]]  # mean, scale, and by kind: weight, bias | vectors, dual, ...

    def scores(self, codes: NDArray[Any]) -> Floats:
        """Return scores (N, C) of codes (N, D), higher for likelier classes."""
        a = self.arrays
        x = Scaler(a["mean"], a["scale"])(unit(codes) if self.l2 else codes)
        if "weight" in a:
            return np.asarray(x @ a["weight"].T + a["bias"])
        kernel = gram(x, a["vectors"], self.kind, self.gamma)
        return _one_against_one(kernel, a["dual"], a["n_vectors"], a["bias"])

    def facts(self) -> dict[str, Any]:
        """Return everything except the arrays, for the metadata of a file."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}


def unit(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Scale codes (N, D) to unit length; a row of zeros doesn't change."""
    length = np.linalg.norm(codes, axis=1, keepdims=True)
    return np.asarray(codes / np.where(length > 0, length, 1), np.float32)


def head_of(probe: Probe) -> tuple[Floats, Floats]:
    """Convert a linear probe into a head on raw codes: weight (C, D) and bias (C,).

    The scaling is folded in, so the head's logits are the probe's scores.
    """
    a = probe.arrays
    weight = a["weight"] / a["scale"]
    return weight, a["bias"] - weight @ a["mean"]


def gram(x: Floats, vectors: Floats, kind: Kind, gamma: float) -> Floats:
    """Compute the kernel (N, S) between standardised codes (N, D) and vectors (S, D)."""
    dot = x @ vectors.T
    if kind == "svm_linear":
        return np.asarray(dot)
    squares = (x**2).sum(1)[:, None] + (vectors**2).sum(1) - 2 * dot
    return np.asarray(np.exp(-gamma * np.maximum(squares, 0)))


def fit_linear(
    x: Floats,
    y: Ints,
    weights: Floats,
    c: float,
    class_weight: str | None,
    start: "LogisticRegression | None" = None,
) -> "LogisticRegression":
    """Fit a logistic regression on standardised codes (N, D), from scratch or from another one.

    The fit runs in double precision until it converges. A fit that stops early depends on its
    start and on the processor's rounding.
    """
    from sklearn.linear_model import LogisticRegression

    settings = {"tol": GRADIENT, "max_iter": STEPS, "warm_start": True}
    model = start or LogisticRegression(class_weight=class_weight, **settings)
    return model.set_params(C=c).fit(x, y, weights)


@dataclass(frozen=True)
class Discriminant:
    """A linear discriminant, with scikit-learn's names, and the moments that it was fitted to."""

    coef_: Floats  # (C, D)
    intercept_: Floats  # (C,)
    classes_: Ints  # (C,)
    moments: "Moments"

    def decision_function(self, x: Floats) -> Floats:
        """Return logarithms of densities times shares (N, C), but for one term a row."""
        return np.asarray(x @ self.coef_.T + self.intercept_)


@dataclass(frozen=True)
class Moments:
    """Weighted moments of codes (N, D) within C classes."""

    shares: Floats  # of the classes in the weights, (C,)
    means: Floats  # (C, D)
    products: Floats  # the covariance within classes (D, D), or with N < D the Gram matrix (N, N)
    spread: Floats | None  # with N < D, what that is of: distances to the class's mean (N, D)

    @classmethod
    def of(cls, x: Floats, classes: Ints, weights: Floats) -> "Moments":
        """Compute them from codes (N, D), each one's place in the list of classes, and weights."""
        weights = weights / weights.sum()
        member = np.eye(classes.max() + 1)[classes] * weights[:, None]
        shares = member.sum(0)
        means = member.T @ x / shares[:, None]
        spread = (x - means[classes]) * np.sqrt(weights)[:, None]
        if len(x) < x.shape[1]:
            return cls(shares, means, spread @ spread.T, spread)
        return cls(shares, means, spread.T @ spread, None)

    def shrunk_solution(self, shrinkage: float) -> Floats:
        """Solve for the means with the covariance drawn towards a multiple of the identity: (C, D).

        With fewer codes than features, by the matrix inversion lemma in N dimensions.
        """
        floor = shrinkage * np.trace(self.products) / self.means.shape[1] or 1.0  # no spread at all
        a = (1 - shrinkage) * self.products
        a[np.diag_indices_from(a)] += floor
        if self.spread is None:
            return np.asarray(solve(a, self.means.T, assume_a="pos").T)
        inner = solve(a, self.spread @ self.means.T, assume_a="pos")
        return np.asarray((self.means - (1 - shrinkage) * inner.T @ self.spread) / floor)


def fit_lda(
    x: Floats,
    y: Ints,
    weights: Floats,
    shrinkage: float,
    class_weight: str | None,
    start: Discriminant | None = None,
) -> Discriminant:
    """Fit a linear discriminant on standardised codes (N, D), with or without another's moments.

    The covariance within classes is shrunk by a given share, as in scikit-learn's
    LinearDiscriminantAnalysis, which knows no weights (Ledoit and Wolf 2004, Journal of
    Multivariate Analysis 88).
    """
    classes, place, counts = np.unique(y, return_inverse=True, return_counts=True)
    if class_weight:
        weights = weights * (len(y) / len(classes) / counts)[place]
    moments = start.moments if start else Moments.of(x, place, weights)
    coef = moments.shrunk_solution(shrinkage)
    bias = np.log(moments.shares) - (moments.means * coef).sum(1) / 2
    return Discriminant(coef, bias, classes, moments)


FITS: dict[Kind, Callable[..., Any]] = {"linear": fit_linear, "lda": fit_lda}  # the others: SVMs


def fit_svm(kernel: Floats, y: Ints, weights: Floats, c: float, class_weight: str | None) -> "SVC":
    """Fit a support vector machine on a kernel (N, N) that all C and folds share."""
    from sklearn.svm import SVC

    settings = {"kernel": "precomputed", "decision_function_shape": "ovo"}
    return SVC(C=c, class_weight=class_weight, **settings).fit(kernel, y, weights)


def class_scores(
    fitted: "LogisticRegression | Discriminant | SVC", x: Floats, n_classes: int
) -> Floats:
    """Return scores (N, C) of codes (N, D), or for an SVC of a kernel (N, S), as `Probe.scores`.

    A class that is missing from the training data gets the lowest score of each row.
    """
    found = fitted.decision_function(x)
    if found.ndim == 1:
        found = np.stack([-found, found], 1) / 2
    elif hasattr(fitted, "support_"):  # an SVC: one column per pair
        found = coupled(found)
    scores = np.repeat(found.min(1, keepdims=True), n_classes, axis=1)
    scores[:, fitted.classes_] = found
    return np.asarray(scores)


def linear_probe(
    fitted: "LogisticRegression | Discriminant",
    scaler: Scaler,
    depth: str,
    l2: bool,
    c: float,
    kind: Kind = "linear",
) -> Probe:
    """Make a probe from a fitted linear model; with two classes, a single row w becomes ±w/2."""
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    arrays = {"mean": scaler.mean, "scale": scaler.scale, "weight": weight, "bias": bias}
    return Probe(kind, depth, c, 0.0, l2, arrays)


def svm_probe(
    fitted: "SVC",
    x: Floats,
    scaler: Scaler,
    depth: str,
    kind: Kind,
    gamma: float,
    l2: bool,
) -> Probe:
    """Make a probe from an SVM that was fitted on the kernel of standardised codes (N, D)."""
    arrays = {
        "mean": scaler.mean,
        "scale": scaler.scale,
        "vectors": x[fitted.support_],  # (S, D), sorted by class
        # With two classes scikit-learn flips the sign that libsvm uses; undo it for one formula.
        "dual": fitted._dual_coef_,  # (C - 1, S)
        "n_vectors": fitted.n_support_.astype(np.int64),  # (C,)
        "bias": fitted._intercept_,  # (C (C - 1) / 2,)
    }
    return Probe(kind, depth, float(fitted.C), gamma, l2, arrays)


def _one_against_one(kernel: Floats, dual: Floats, n_vectors: Ints, bias: Floats) -> Floats:
    """Score with libsvm's binary classifiers, one per pair of classes: (N, S) -> (N, C).

    With two classes, the scores are plus and minus half the decision value; else see `coupled`.
    """
    ends = n_vectors.cumsum()
    of = [slice(end - n, end) for end, n in zip(ends, n_vectors, strict=True)]
    # Row r holds a vector's coefficient against class r, or against r + 1 from its own class on.
    if len(of) == 2:
        first = kernel[:, of[0]] @ dual[0, of[0]] + kernel[:, of[1]] @ dual[0, of[1]] + bias[0]
        return np.stack([first, -first], 1) / 2
    classes = range(len(of))
    # The contribution of each class's vectors against each other class.
    own = [np.insert(dual[:, of[i]] @ kernel[:, of[i]].T, i, 0, axis=0) for i in classes]
    return coupled(np.stack([own[i][j] + own[j][i] for i, j in combinations(classes, 2)], 1) + bias)


def coupled(decisions: Floats) -> Floats:
    """Couple the decision values of pairs of classes (N, C (C - 1) / 2) into scores (N, C).

    The scores are the logarithms of 1 / (sum of 1 / r_ij over j - (C - 2)), with r_ij the sigmoid
    of the decision for class i against j (Price et al. 1994, Advances in Neural Information
    Processing Systems 7). scikit-learn's votes say which class wins, but little about the
    confidence. Pairs are in the order (0, 1), (0, 2), ..., (1, 2), ...
    """
    n_classes = int((1 + np.sqrt(1 + 8 * decisions.shape[1])) / 2)
    scores = np.empty((len(decisions), n_classes))
    rows, columns = np.triu_indices(n_classes, 1)
    each = max(1, AT_ONCE // n_classes**2)
    for start in range(0, len(decisions), each):
        part = decisions[start : start + each]
        pairs = np.zeros((len(part), n_classes, n_classes))
        pairs[:, rows, columns], pairs[:, columns, rows] = part, -part
        scores[start : start + each] = -logsumexp(-SHARPNESS * pairs, axis=2)
    return scores


def save_probes(file: Path, winner: Probe, linear: Probe, meta: dict[str, Any]) -> None:
    """Write both probes into one file, each array under its probe's name."""
    both = {"winner": winner, "linear": linear}
    tensors = {f"{n}.{k}": a for n, probe in both.items() for k, a in probe.arrays.items()}
    checkpoint.write(file, tensors, {**meta, **{n: probe.facts() for n, probe in both.items()}})


def read_probes(file: Path) -> tuple[Probe, Probe, dict[str, Any]]:
    """Read the winner, the linear probe on the last codes, and the metadata.

    Raises CheckpointError if the file holds no probes.
    """
    tensors, meta = checkpoint.read(file)
    if "winner" not in meta or "linear" not in meta:
        raise CheckpointError(f"{file}: holds no probes; run `dvc repro probe`")

    def probe(name: str) -> Probe:
        return Probe(**meta[name], arrays=checkpoint.strip_prefix(tensors, f"{name}."))

    with checkpoint.checked_metadata(file):
        return probe("winner"), probe("linear"), meta
