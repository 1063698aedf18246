"""Draw ``docs/figures/packed_layout.svg``: a grid of patches, the packed batch, and one patch with its halo."""

from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

ACTIVE = [
    [0, 1, 0, 0, 1],
    [1, 1, 0, 1, 0],
    [0, 0, 1, 1, 0],
    [1, 0, 0, 0, 1],
    [0, 1, 1, 0, 0],
]
TINTS = [
    "#0b3954",
    "#13638c",
    "#1b8ac0",
    "#52abd3",
    "#8ecae6",
    "#ffb703",
    "#fb8500",
    "#e85d04",
    "#9d4edd",
    "#5a189a",
    "#2a9d8f",
]
CENTRE = (2, 2)


def cells() -> list[tuple[int, int]]:
    """Return the active (row, column) pairs in packed order."""
    return [(r, c) for r, row in enumerate(ACTIVE) for c, on in enumerate(row) if on]


def patch(axes, x: float, y: float, size: float, colour: str, label: str = "") -> None:
    """Draw one patch with its pixels."""
    axes.add_patch(Rectangle((x, y), size, size, facecolor=colour, edgecolor="white", linewidth=1.2))
    for step in (0.25, 0.5, 0.75):
        axes.plot([x, x + size], [y + step * size] * 2, color="white", linewidth=0.25)
        axes.plot([x + step * size] * 2, [y, y + size], color="white", linewidth=0.25)
    if label:
        axes.text(x + size / 2, y + size / 2, label, ha="center", va="center", color="white", fontsize=8, weight="bold")


def arrow(axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """Draw an arrow with a caption above it."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#444"))
    axes.text((start[0] + end[0]) / 2, start[1] + 0.18, text, ha="center", va="bottom", fontsize=9, color="#444")


def main() -> None:
    """Write the figure beside this file."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    order = {cell: i for i, cell in enumerate(cells())}
    for r in range(5):
        for c in range(5):
            on = (r, c) in order
            patch(axes, c, 4 - r, 1, TINTS[order[r, c]] if on else "#e4e7eb", str(order[r, c]) if on else "")
    axes.text(
        2.5,
        5.25,
        "image and grid: 11 of 25 patches active\nslot map: the row of each patch, -1 where inactive",
        ha="center",
        fontsize=9,
    )
    arrow(axes, (5.2, 2.5), (6.9, 2.5), "pack")
    for i in range(len(order)):
        patch(axes, 7.2 + (i % 2) * 0.9, 4.15 - (i // 2) * 0.86, 0.78, TINTS[i], str(i))
    axes.text(
        8.1,
        5.25,
        "packed: an ordinary tensor (N, C, p, p)\nchannels_last, batch = active patches",
        ha="center",
        fontsize=9,
    )
    arrow(axes, (9.3, 2.5), (11.0, 2.5), "halo of row 5")
    draw_halo(axes, order)
    axes.set_xlim(-0.2, 16.4)
    axes.set_ylim(-0.9, 6.1)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


def draw_halo(axes, order: dict[tuple[int, int], int]) -> None:
    """Draw the tile that a 3x3 convolution reads for the patch in the centre of the grid."""
    left, bottom, pixel = 11.4, 0.4, 0.7
    for y in range(6):
        for x in range(6):
            cell = (CENTRE[0] + (y > 4) - (y < 1), CENTRE[1] + (x > 4) - (x < 1))
            colour = TINTS[order[cell]] if cell in order else "#e4e7eb"
            axes.add_patch(
                Rectangle(
                    (left + x * pixel, bottom + (5 - y) * pixel), pixel, pixel, facecolor=colour, edgecolor="white"
                )
            )
    axes.add_patch(
        Rectangle((left + pixel, bottom + pixel), 4 * pixel, 4 * pixel, fill=False, edgecolor="black", linewidth=1.5)
    )
    axes.text(
        13.5,
        5.25,
        "a 3x3 conv reads one pixel around the patch\nthrough the slot map; inactive pixels read as 0",
        ha="center",
        fontsize=9,
    )
    axes.text(
        13.5,
        -0.1,
        "batch norm, ReLU, 1x1 conv, residual adds need no halo:\nPyTorch's own run on the packed tensor unchanged",
        ha="center",
        va="top",
        fontsize=9,
        color="#444",
    )


if __name__ == "__main__":
    main()
