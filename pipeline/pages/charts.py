"""Charts as SVG, drawn by Vega-Lite, that follow a page's colours: light, dark and in print.

Hues are from the palette of Okabe and Ito, which colour-blind people can tell apart. A hue with a
meaning always comes with a dash or a shape of the same meaning.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any
from zlib import crc32

import vl_convert
from markupsafe import Markup

BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#888888"  # blue is lighter in dark mode
VEGA_LITE = "6.4"  # the version of the language
WIDTH, HEIGHT = 290, 200  # with the axis labels no wider than a phone's screen
TEXT = "currentColor"  # the page's own
CONFIG = {
    "aria": False,  # the whole chart has one description
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": "transparent"},
    "axis": {
        **dict.fromkeys(
            ("labelColor", "titleColor", "domainColor", "tickColor", "gridColor"), TEXT
        ),
        **dict.fromkeys(("labelFontSize", "titleFontSize"), 12),
        "gridOpacity": 0.15,
        "labelLimit": 110,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": TEXT,
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "symbolType": "stroke",
        "symbolSize": 300,
        "symbolStrokeWidth": 2,
        "labelLimit": 120,
    },
}
Row = dict[str, Any]


def draw(spec: dict[str, Any], described: str) -> Markup:
    """Draw a chart, with a description for screen readers."""
    whole = {"width": WIDTH, "height": HEIGHT, "config": CONFIG, **spec}
    svg: str = vl_convert.vegalite_to_svg(whole, vl_version=VEGA_LITE)
    # A page holds many charts, whose ids must differ.
    own = f"chart-{crc32(described.encode()):08x}-"
    svg = svg.replace(' id="', f' id="{own}').replace("url(#", f"url(#{own}")
    svg = svg.replace('href="#', f'href="#{own}').replace(BLUE, "var(--data)")
    label = escape(described, quote=True)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # noqa: S704


def intervals(rows: Sequence[Row], title: str, described: str, zero: bool = False) -> Markup:
    """Draw values with their intervals: rows of name, value and, if any, low, high, in percent."""
    names = {"field": "name", "type": "nominal", "sort": None, "title": None}
    x = {"type": "quantitative", "title": title, "scale": {"zero": zero, "nice": True}}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rule", "strokeWidth": 3, "color": BLUE, "opacity": 0.6},
            "transform": [{"filter": "isValid(datum.low)"}],
            "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "color": BLUE, "opacity": 1},
            "encoding": {"x": {**x, "field": "value"}},
        },
    ]
    if zero:
        rule = {"type": "rule", "color": TEXT, "strokeDash": [4, 3]}
        layers.append({"mark": rule, "encoding": {"x": {"datum": 0}}})
    spec = {
        "height": {"step": 30},
        "data": {"values": list(rows)},
        "encoding": {"y": names},
        "layer": layers,
    }
    return draw(spec, described)


def curves(rows: Sequence[Row], title: str, between: int, described: str) -> Markup:
    """Draw learning curves: rows of epoch, split, value; stage 2 begins at `between`."""
    two = {"domain": ["train", "validation"], "range": [GREY, BLUE]}
    line = {
        "mark": {"type": "line", "point": {"size": 25}},
        "encoding": {
            "x": {
                "field": "epoch",
                "type": "quantitative",
                "title": "epoch",
                "axis": {"tickMinStep": 1, "grid": False},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": title,
                "scale": {"zero": False},
            },
            "color": {"field": "split", "type": "nominal", "scale": two},
            "strokeDash": {
                "field": "split",
                "type": "nominal",
                "scale": {"domain": ["train", "validation"], "range": [[5, 3], [1, 0]]},
            },
            "detail": {"field": "stage", "type": "nominal"},
        },
    }
    rule = {"type": "rule", "color": TEXT, "opacity": 0.5}
    label = {"type": "text", "align": "left", "dx": 4, "y": 8, "color": TEXT, "text": "stage 2"}
    layers = [
        line,
        {"data": {"values": [{}]}, "mark": rule, "encoding": {"x": {"datum": between}}},
        {"data": {"values": [{}]}, "mark": label, "encoding": {"x": {"datum": between}}},
    ]
    return draw({"data": {"values": list(rows)}, "layer": layers}, described)


def steps(rows: Sequence[Row], x: str, y: str, described: str, *, ordered: bool = False) -> Markup:
    """Draw a line through rows of x and y; `ordered`: x are names, in the order given."""
    names = {"type": "nominal", "sort": None, "axis": {"labelAngle": -45, "grid": False}}
    numbers = {"type": "quantitative", "axis": {"grid": False}}
    spec = {
        "data": {"values": list(rows)},
        "mark": {"type": "line", "point": {"size": 40, "filled": True}, "color": BLUE},
        "encoding": {
            "x": {"field": "x", "title": x, **(names if ordered else numbers)},
            "y": {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": False}},
        },
    }
    return draw(spec, described)


def operating_curve(rows: Sequence[Row], described: str) -> Markup:
    """Draw precision by recall in percent; `at` marks the thresholds from the chosen one on."""
    x, y = (
        {
            "field": name,
            "type": "quantitative",
            "title": f"{name}, %",
            "scale": {"domain": [0, 100]},
        }
        for name in ("recall", "precision")
    )
    chosen = max((row for row in rows if row["at"]), key=lambda row: row["recall"], default=None)
    line = {"mark": {"type": "line", "color": BLUE, "interpolate": "linear"}}
    dot = {
        "data": {"values": [chosen] if chosen else []},
        "mark": {"type": "point", "filled": True, "size": 90, "color": VERMILION},
    }
    spec = {
        "data": {"values": list(rows)},
        "encoding": {"x": {**x, "axis": {"grid": False}}, "y": {**y, "axis": {"grid": False}}},
        "layer": [line, dot],
    }
    return draw(spec, described)


def confusion(rows: Sequence[Row], described: str) -> Markup:
    """Draw a confusion matrix: rows of actual, predicted, images and share of the actual class."""
    side = {"step": max(34, 200 // math.isqrt(len(rows)))}
    axis = {"type": "nominal", "sort": None}
    spec = {
        "width": side,
        "height": side,
        "data": {"values": list(rows)},
        "encoding": {
            "x": {"field": "predicted", "title": "predicted", "axis": {"labelAngle": -45}, **axis},
            "y": {"field": "actual", "title": "actual", **axis},
        },
        "layer": [
            {
                "mark": "rect",
                "encoding": {
                    "color": {
                        "field": "share",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": ["#deebf7", "#08306b"]},
                        "legend": None,
                    }
                },
            },
            {
                "mark": {"type": "text", "fontSize": 12},
                "encoding": {
                    "text": {"field": "images", "type": "quantitative"},
                    "color": {
                        "condition": {"test": "datum.share > 0.45", "value": "white"},
                        "value": "black",
                    },
                },
            },
        ],
    }
    return draw(spec, described)


def calibration(rows: Sequence[Row], described: str) -> Markup:
    """Draw accuracy against confidence: rows of when, confidence, accuracy, in percent."""
    least = min(min(row["confidence"], row["accuracy"]) for row in rows)
    low = 10 * (least // 10)
    domain = {"domain": [low, 100], "nice": False}
    kinds = {"field": "when", "type": "nominal", "sort": None}
    diagonal = [{"confidence": end, "accuracy": end} for end in (low, 100)]
    x = {"field": "confidence", "type": "quantitative", "title": "confidence, %", "scale": domain}
    y = {"field": "accuracy", "type": "quantitative", "title": "accuracy, %", "scale": domain}
    spec = {
        "data": {"values": list(rows)},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "data": {"values": diagonal},
                "mark": {"type": "line", "color": TEXT, "opacity": 0.4, "strokeDash": [4, 3]},
            },
            {
                "mark": {"type": "line", "point": {"size": 45, "filled": True}},
                "encoding": {
                    "color": {**kinds, "scale": {"range": [VERMILION, BLUE]}},
                    "shape": {
                        **kinds,
                        "scale": {"range": ["square", "circle"]},
                        "legend": None,
                    },
                    "strokeDash": {**kinds, "scale": {"range": [[5, 3], [1, 0]]}},
                },
            },
        ],
    }
    return draw(spec, described)


# Like Vega-Embed's own function, but without warnings about values that DVC's templates leave empty
# or that an earlier Vega-Lite wrote.
EMBED = """const isEmpty = v => v?.constructor === Object && !Object.keys(v).length;
const cleaned = spec => JSON.parse(JSON.stringify(spec), (k, v) => isEmpty(v) ? undefined : v);
window.vegaEmbed = (place, {$schema, ...spec}, options) =>
  vegaEmbed(place, cleaned(spec), {...options, mode: "vega-lite", logLevel: 1});"""


def script() -> Markup:
    """Return the script that draws charts in a browser: Vega, Vega-Lite and Vega-Embed."""
    return Markup(vl_convert.javascript_bundle(EMBED, VEGA_LITE))  # noqa: S704
