"""Figures of the report as inline SVG. Axes and text take the colour of the page's text, on light and dark pages."""

import io
import re
import warnings
from typing import Any

import numpy as np

INK = "#010203"  # colour of axes and text, later replaced by currentColor, which matplotlib does not know
MAX_LEGEND = 20  # largest number of classes with a legend; more colours cannot be distinguished


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
    )
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str, title: str) -> str:
    """Returns the figure as an SVG element for HTML. All its ids start with `name`."""
    import matplotlib

    out = io.StringIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text with its own fonts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()

    def ours(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0].replace(INK, "currentColor"))

    svg = re.sub(r"<[^>]*>", ours, svg[svg.index("<svg") :])
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def curves(
    name: str,
    ylabel: str,
    lines: dict[str, tuple[list[float], list[float]]],
    log: bool = False,
    from_0: bool = False,
    xlabel: str = "epoch",
) -> str:
    """Draws lines, as an SVG element.

    Args:
        name: prefix of the element's ids, unique in the page.
        ylabel: label of the vertical axis.
        lines: {label: (positions, values)}. A value of None leaves a gap; it stands for a value that was not finite.
        log: make the vertical axis logarithmic.
        from_0: start the vertical axis at 0.
        xlabel: label of the horizontal axis.
    """
    figure, axes = _figure(5.2, 2.8)
    for label, (positions, values) in lines.items():
        y = np.array([np.nan if value is None else value for value in values])
        axes.plot(positions, y, marker="o" if len(y) < 30 else None, markersize=3, linewidth=1.2, label=label)
    if log:
        axes.set_yscale("log")
    elif from_0:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color=INK, alpha=0.15, linewidth=0.5)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure, name, f"{ylabel} by {xlabel}")


def scatter(name: str, points: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """Draws points (N, 2), coloured by class, as an SVG element, with a legend for at most MAX_LEGEND classes."""
    import matplotlib

    figure, axes = _figure(5.2, 4.6)
    few = len(classes) <= MAX_LEGEND
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20" if few else "hsv"]
    handles: list[Any] = []
    for label in range(len(classes)):
        mine = points[labels == label]
        color = palette(label if few else label / len(classes))
        handles += axes.plot(*mine.T, "o", markersize=3, color=color, markeredgewidth=0)
    axes.set_axis_off()
    if few:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        names = [name if len(name) <= 24 else f"{name[:23]}..." for name in classes]
        legend = axes.legend(handles, names, frameon=False, labelcolor=INK, markerscale=2, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign in a name does not start a formula
    return _svg(figure, name, "t-SNE of test latents, coloured by class")
