"""The gain of fine-tuning on known data sets, and the gain to expect on another one.

Only numbers are used: no images, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t


@dataclass(frozen=True)
class PriorResult:
    """One data set: a linear classifier on the last codes, and the fine-tuned network."""

    name: str
    images: int  # of training
    linear: float  # test accuracy
    fine_tuned: float  # test accuracy
    scratch: float | None = None  # the same network trained from scratch
    classes: tuple[str, ...] = ()  # so that a set isn't used as evidence for itself

    @property
    def gain(self) -> float:
        """Return the gain in log-odds, as points have no room at accuracies near 1."""
        return float(logit(self.fine_tuned) - logit(self.linear))


# ResNet-50, pretrained on ImageNet with labels: table 3 of Grill et al. 2020 (BYOL, arXiv
# 2006.07733), which repeats Chen et al. 2020 (SimCLR, arXiv 2002.05709). Mean average precision for
# VOC2007, mean accuracy per class for Aircraft, Pets, Caltech-101 and Flowers.
PUBLISHED = (
    PriorResult("Food-101", 75_750, 0.723, 0.883, 0.869),
    PriorResult("CIFAR-10", 50_000, 0.936, 0.975, 0.959),
    PriorResult("CIFAR-100", 50_000, 0.783, 0.864, 0.802),
    PriorResult("Birdsnap", 47_386, 0.537, 0.758, 0.761),
    PriorResult("SUN397", 19_850, 0.619, 0.643, 0.536),
    PriorResult("Cars", 8_144, 0.667, 0.921, 0.914),
    PriorResult("Aircraft", 6_667, 0.610, 0.860, 0.859),
    PriorResult("VOC2007", 5_011, 0.828, 0.850, 0.673),
    PriorResult("DTD", 3_760, 0.749, 0.746, 0.648),
    PriorResult("Pets", 3_680, 0.915, 0.921, 0.815),
    PriorResult("Caltech-101", 3_060, 0.945, 0.933, 0.726),
    PriorResult("Flowers", 2_040, 0.947, 0.976, 0.920),
)
# This pipeline's own runs with EfficientNet-Lite0, from runs/seeds.py and runs/known.py.
CELLS = ("defective", "functional")
DIGITS = tuple("0123456789")
CLOTHES = (
    *("Ankle boot", "Bag", "Coat", "Dress", "Pullover"),
    *("Sandal", "Shirt", "Sneaker", "T-shirt-top", "Trouser"),
)
EMOJI = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body"),
    *("Smileys & Emotion", "Symbols", "Travel & Places"),
)
OURS = (
    PriorResult("digits", 1_146, 0.944, 0.971, classes=DIGITS),
    PriorResult("digits-few", 230, 0.832, 0.855, classes=DIGITS),
    PriorResult("elpv-few", 468, 0.729, 0.817, classes=CELLS),
    PriorResult("elpv-group", 1_670, 0.814, 0.852, classes=CELLS),  # five seeds
    PriorResult("emoji-few", 648, 0.692, 0.650, classes=EMOJI),
    PriorResult("fashion", 5_100, 0.863, 0.912, classes=CLOTHES),
    PriorResult("hymenoptera", 207, 0.961, 0.957, classes=("ants", "bees")),  # five seeds
    PriorResult("mnist", 5_100, 0.915, 0.979, classes=DIGITS),
)

# Sets of fewer images gained little (median of the four smallest: 0.03), larger ones much (0.99).
LARGE = 5_000

# Width of the kernel over set sizes: at a factor of three in size, a set has a weight of 0.6.
DECADES = 0.5


@dataclass(frozen=True)
class Expected:
    """The expected gain in accuracy; low and high are the bounds of an 80 % prediction interval."""

    gain: float
    low: float
    high: float
    sets: float  # effective number of known sets


def expected_gain(
    images: int, linear: float, winner: float, known: Sequence[PriorResult], share: float = 0.8
) -> Expected:
    """Estimate the gain of stage 2 over the winning probe, from known sets of similar size.

    The gain over the linear probe, in log-odds, is the mean of the known gains, weighted by a
    Gaussian in log10 of the size (Nadaraya 1964, Watson 1964). The interval is a prediction
    interval for one more set (a t-interval with the effective number of sets). The lead of the
    winning probe over the linear one is subtracted.

    `linear` and `winner` are accuracies by cross-validation, strictly between 0 and 1.
    """
    sizes = np.log10([k.images for k in known])
    gains = np.array([k.gain for k in known])
    weights = np.exp(-0.5 * ((sizes - np.log10(images)) / DECADES) ** 2)
    weights /= weights.sum()
    sets = float(1 / (weights**2).sum())
    mean = float(weights @ gains)
    freedom = max(sets - 1, 0.5)
    variance = float(weights @ (gains - mean) ** 2) * sets / freedom
    reach = float(t.ppf(0.5 + share / 2, freedom)) * np.sqrt(variance * (1 + 1 / sets))
    low, middle, high = (
        float(expit(logit(linear) + mean + off)) - winner for off in (-reach, 0, reach)
    )
    return Expected(middle, low, high, sets)
