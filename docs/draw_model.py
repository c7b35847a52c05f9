"""Draws the model of a config as docs/model.svg: shapes, the two views, the sections of z, and a masked section.

The blocks and sections are read from the decoder that the config builds.

  python -m docs.draw_model
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from config.reading import load_config
from config.schema import Config
from experiment.models import build_on_meta
from model.decoder import Layer, UNetDecoder

DOWN, UP, WIDTH, HEIGHT = 6.2, 9.6, 1.7, 0.62  # x of the two columns of the UNet; width and height of a block


class Picture:
    """Boxes and arrows on axes with one unit per row. The y axis points down."""

    def __init__(self, rows: int, sections: int) -> None:
        self.figure = Figure(figsize=(12.5, 0.47 * (max(rows, 10) + 3)), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.set(xlim=(-0.1, 12.2), ylim=(max(rows, 10) + 0.9, -1.5))
        self.axes.axis("off")
        self.dropped = min(3, sections - 1)  # index of the section that is drawn as masked

    def box(self, x: float, y: float, text: str, color: Any = "white", hatch: str | None = None, **size: float) -> None:
        """Draws a box with its centre at (x, y) and a text in it. `size` may give `width` and `height`."""
        width, height = size.get("width", WIDTH), size.get("height", HEIGHT)
        corner = x - width / 2, y - height / 2
        self.axes.add_patch(
            Rectangle(corner, width, height, facecolor=color, edgecolor="0.35", lw=0.8, hatch=hatch, zorder=2)
        )
        if hatch:  # a plain background keeps the text readable
            self.axes.add_patch(Rectangle((x - width * 0.46, y - 0.2), width * 0.92, 0.4, facecolor=color, zorder=3))
        self.text(x, y, text)

    def text(self, x: float, y: float, text: str, **more: Any) -> None:
        """Writes a text centred at (x, y). `more` are further arguments of matplotlib's `Axes.text`."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 9, "zorder": 4, **more})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
        """Draws an arrow. `more` are further arrow properties of matplotlib's `Axes.annotate`."""
        style = {"arrowstyle": "-|>", "color": "0.25", "lw": 1.1, "shrinkA": 0, "shrinkB": 0, **more}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=1)

    def color(self, section: int) -> Any:
        """Returns the colour of a section."""
        return matplotlib.colormaps["tab20"]((2 * section + 1 - section // 10) % 20)

    def block(self, x: float, y: float, layer: Layer, attends: bool) -> None:
        """Draws a residual block in the colour of its section, hatched if the section is drawn as masked."""
        hatch = "////" if layer.section == self.dropped else None
        text = f"{layer.name}{'  + attention' if attends else ''}   $z_{{{layer.section}}}$"
        self.box(x, y, text, self.color(layer.section), hatch)


def draw(config: Config) -> Figure:
    """Returns a figure of the model that the config describes."""
    soda = build_on_meta(config)
    decoder: UNetDecoder = soda.decoder
    layers = {layer.name: layer for layer in decoder.layers()}
    going_up = [layer for name, layer in layers.items() if name.startswith("up.")]
    rows = len(going_up)  # each of these blocks consumes one skip connection
    attends = {name: decoder.get_submodule(name).attention is not None for name in layers}
    picture = Picture(rows, len(decoder.section_dims))
    bottom, left_bottom = float(rows), max(float(rows), 10.0)

    # The UNet. In row i, the layer on the left produces the i-th skip connection, and the block on the right consumes
    # it.
    resolution, above = config.decoder_size, going_up[-1]
    makers = [("conv_in", None), *((f"down.{i}", layers.get(f"down.{i}")) for i in range(len(decoder.down)))]
    for row, ((name, layer), consumer) in enumerate(zip(makers, reversed(going_up), strict=True)):
        if layer is not None:
            picture.block(DOWN, row, layer, attends[name])
        else:
            resolution = resolution if name == "conv_in" else resolution // 2
            picture.box(DOWN, row, f"{name}   {'3x3' if name == 'conv_in' else 'halves'}")
            picture.text(DOWN - WIDTH / 2 - 0.1, row, f"{resolution} px", ha="right", color="0.3")
        if layer is not None:
            picture.text(DOWN - WIDTH / 2 - 0.1, row, f"{layer.channels}", ha="right", fontsize=7.5, color="0.3")
        picture.block(UP, row, consumer, attends[consumer.name])
        picture.arrow((DOWN + WIDTH / 2, row), (UP - WIDTH / 2, row), linestyle=":", lw=0.9)
        if row:
            picture.arrow((DOWN, row - 1 + HEIGHT / 2), (DOWN, row - HEIGHT / 2))
            picture.arrow((UP, row - HEIGHT / 2), (UP, row - 1 + HEIGHT / 2))
            if consumer.resolution < above.resolution:
                picture.text(UP + 0.08, row - 0.5, f"doubles to {above.resolution} px", ha="left", fontsize=7.5)
        picture.text(UP + WIDTH / 2 + 0.08, row, f"{consumer.channels}", ha="left", fontsize=7.5, color="0.3")
        above = consumer
    middle = [layer for name, layer in layers.items() if name.startswith("middle.")]
    places = [DOWN + (UP - DOWN) * share for share in (0.2, 0.8)]
    for x, layer in zip(places, middle, strict=True):
        picture.block(x, bottom, layer, attends[layer.name])
    for start, end in (
        ((DOWN, bottom - 1 + HEIGHT / 2), (places[0], bottom - HEIGHT / 2)),
        ((places[0] + WIDTH / 2, bottom), (places[1] - WIDTH / 2, bottom)),
        ((places[1], bottom - HEIGHT / 2), (UP, bottom - 1 + HEIGHT / 2)),
    ):
        picture.arrow(start, end)
    picture.text((DOWN + UP) / 2, -0.32, "skips, concatenated", fontsize=8, color="0.3")
    picture.text(UP + WIDTH / 2 + 0.36, 0, "channels", ha="left", fontsize=7.5, color="0.3")

    # Input and output.
    source_shape, target_shape = (f"(N, 3, {size}, {size})" for size in (config.encoder_size, config.decoder_size))
    picture.box(DOWN, -1.1, f"$x_t$ {target_shape}", "white", width=2.3)
    picture.arrow((DOWN, -1.1 + HEIGHT / 2), (DOWN, -HEIGHT / 2))
    picture.box(UP, -1.1, f"{config.diffusion.prediction} {target_shape}", "white", width=2.3)
    picture.text(UP + 0.08, -0.55, "conv(silu(norm(h)))", ha="left", fontsize=7.5)
    picture.box((DOWN + UP) / 2, -1.1, "timestep t,\nto every block", "white", width=1.0, height=0.8)
    picture.arrow((UP, -HEIGHT / 2), (UP, -1.1 + HEIGHT / 2))
    truth = "noise" if config.diffusion.prediction == "eps" else f"true {config.diffusion.prediction}"
    picture.text(UP + 1.2, -1.1, f"loss =\nmean ({config.diffusion.prediction} - {truth})²", ha="left")

    # Two views and the latent.
    x_z, top, height = 3.9, 1.6, (left_bottom - 2.6) / len(decoder.section_dims)
    picture.box(0.95, -1.1, f"target view {target_shape}", "white", width=2.1)
    picture.arrow((2.0, -1.1), (DOWN - 1.15, -1.1))
    picture.text(3.55, -1.36, "+ noise of timestep t", fontsize=8)
    picture.box(0.95, top + 0.3, f"source view {source_shape}", "white", width=2.1)
    encoder = f"{config.encoder.architecture}\nto (N, {soda.encoder.pooled_dim}),\nlinear to z"
    picture.box(0.95, top + 2.6, encoder, height=1.7)
    picture.arrow((0.95, top + 0.3 + HEIGHT / 2), (0.95, top + 2.6 - 0.85))
    picture.arrow((0.95 + WIDTH / 2, top + 2.6), (x_z - 0.75, top + 2.6))
    picture.text(0.45, top - 1.2, "two views of one image", ha="left", fontsize=8, color="0.3")
    picture.arrow((0.35, top - HEIGHT / 2 + 0.3), (0.35, -1.1 + HEIGHT / 2), linestyle=":", arrowstyle="-")
    picture.text(x_z, top - 0.3, f"z (N, {config.encoder.latent_dim})")
    for section, dims in enumerate(decoder.section_dims):
        y = top + height * (section + 0.5)
        text = f"$z_{{{section}}}$ ({dims})" + ("  zeros" if section == picture.dropped else "")
        hatch = "////" if section == picture.dropped else None
        picture.box(x_z, y, text, picture.color(section), hatch, width=1.5, height=height)
    row = next(row for row in range(rows // 2, rows) if makers[row][1] is not None)
    picture.arrow((x_z + 0.75, row), (DOWN - WIDTH / 2 - 0.45, row))
    picture.text(x_z + 0.8, row - 0.12, "one section\nper block", ha="left", va="bottom", fontsize=7.5)
    y = top + height * (picture.dropped + 0.5)
    picture.text(x_z - 0.85, y + 0.3, "masked: hatched blocks\nget zeros", ha="right", fontsize=8)
    picture.text(
        -0.1,
        left_bottom - 0.3,
        "Each block computes "
        + (r"$\frac{1}{\sqrt{2}}$ [ " if config.initialization == "paper" else "")
        + "skip(x) + conv(dropout(silu(AdaGN(conv(silu(norm(x)))))))"
        + (" ]" if config.initialization == "paper" else "")
        + ".\n"
        r"AdaGN(h) = $z_s$ ($t_s$ GroupNorm(h) + $t_b$) + $z_b$. $t_s, t_b$ come from the timestep," + "\n"
        r"$z_s, z_b$ from the section of z in the colour of the block.",
        ha="left",
        va="top",
        fontsize=8.5,
        linespacing=1.5,
    )
    return picture.figure


def main(argv: list[str] | None = None) -> None:
    """Draws the figure with the arguments `argv` (None: those of the command line)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="config/cifar10_paper.yaml", help="config file of the model; default: %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("model.svg"),
        help="SVG file for the figure; default: %(default)s",
    )
    args = parser.parse_args(argv)
    matplotlib.rcParams["svg.hashsalt"] = "SODA"  # makes the file reproducible
    matplotlib.rcParams["hatch.linewidth"] = 0.5
    figure = draw(load_config(args.config))
    figure.savefig(args.out, dpi=100, metadata={"Date": None} if args.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
