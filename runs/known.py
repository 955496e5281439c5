"""Compare expected with measured gains of the runs in results.csv; show what predicts a gain.

    python -m runs.known

Prints the lines for OURS in pipeline/advice/prior_results.py, a table for docs/advice.md (the
expected gain is recomputed without the runs on the same data), and the Spearman correlation of each
measure with the gains. All use the runs' means over seeds.
"""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from scipy.special import logit
from scipy.stats import spearmanr

from pipeline.advice.prior_results import OURS, PUBLISHED, Expected, expected_gain

RESULTS = Path(__file__).with_name("results.csv")
EVIDENCE = ("early", "late", "source_confidence", "source_information")
NUMBERS = ("images", "probe_linear", "probe", "stage2", "cv_probe_linear", "cv_probe", *EVIDENCE)
SAME_DATA = {"tutorial": "hymenoptera"}


def main() -> None:
    """Print all."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["case"]]
    by_name: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        by_name[line["name"]].append(line)
    means = {
        name: {k: mean(float(line[k]) for line in of if line[k]) for k in NUMBERS}
        for name, of in by_name.items()
    }
    for name, m in means.items():
        figures = f"{m['images']:.0f}, {m['probe_linear']:.3f}, {m['stage2']:.3f}"
        print(f'    PriorResult("{name}", {figures}),')

    print("\n| run | seeds | case | images | best probe | stage 2 | expected | measured | held |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, m in means.items():
        of = by_name[name]
        gains = [float(line["gain_accuracy"]) for line in of]
        # With one run, the interval over its test images; with several, the spread over seeds.
        ends = [float(of[0][f"gain_{k}"]) for k in ("low", "high")]
        spread = f"± {100 * stdev(gains):.1f}" if len(of) > 1 else f"({points(*ends)})"
        expected = expectation(name, m)
        cells = (
            name,
            len(of),
            " or ".join(sorted({line["case"] for line in of})),
            f"{m['images']:.0f}",
            f"{m['probe']:.3f}",
            f"{m['stage2']:.3f}",
            f"{points(expected.gain)} ({points(expected.low, expected.high)})",
            f"{points(mean(gains))} {spread}",
            "yes" if expected.low <= mean(gains) <= expected.high else "no",
        )
        print("|", " | ".join(map(str, cells)), "|")

    gains = [float(logit(m["stage2"]) - logit(m["probe_linear"])) for m in means.values()]
    print(f"\nrank correlation with the gain over the linear probe in log-odds, {len(means)} runs:")
    evidence = {k: [m[k] for m in means.values()] for k in ("images", "probe_linear", *EVIDENCE)}
    evidence["late - early"] = [m["late"] - m["early"] for m in means.values()]
    for name, values in evidence.items():
        found = spearmanr(values, gains)
        print(f"  {name:<20} {found.statistic:+.2f} (p = {found.pvalue:.2f})")


def expectation(name: str, m: dict[str, float]) -> Expected:
    """Return the expected gain of a run, without the results of other runs on its data."""
    others = [k for k in OURS if data_of(k.name) != data_of(name)]
    return expected_gain(
        round(m["images"]), m["cv_probe_linear"], m["cv_probe"], [*PUBLISHED, *others]
    )


def data_of(name: str) -> str:
    """Return the name of the data of a run: elpv-few is on elpv."""
    first = name.replace(" ", "-").split("-")[0]
    return SAME_DATA.get(first, first)


def points(*shares: float) -> str:
    """Format differences of accuracy in points."""
    return " to ".join(f"{100 * share:+.1f}" for share in shares)


if __name__ == "__main__":
    main()
