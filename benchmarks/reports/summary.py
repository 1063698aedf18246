"""The one table of the README: the ratios that a reader asks for first, those where little is gained among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..measure.rows import Row, words
from .markdown import distinct, find, hardest, of_suite, origin, percent, ratio_cell, table

__all__ = ["NOTE", "device_summary"]

LAYER = "3x3 s1 p8 C64-64 g1"  # the first stage of a ResNet-18
MASKED, LITTLE = "0.6", "0.3"  # masked shares: of all rows, and of one more that shows a small gain
HOW = {" graph": ", one CUDA graph", " graphed": ", `graphed`, new masks", "": ", kernel by kernel"}
STEPS = {"exact": "exact decoder", "sparse": "sparse decoding", "light": "`light` decoder"}
HEADER = ("what", "masked", "over dense", "over SparK's way", "over MinkowskiEngine", "in `benchmarks/`")
NOTE = (
    "Convolutions and encoders run forward and backward. A step is compared with the best dense step that we can write "
    "and with the published one (NCHW, eager, the whole image decoded). MinkowskiEngine meets a new mask each time, as "
    "in training. All tables, pictures and machines: [docs/benchmarks.md](docs/benchmarks.md)."
)

Line = tuple[str, ...]


def device_summary(name: str, rows: Sequence[Row], results: str) -> str:
    """Return the table of one device; ``results`` is the folder of all devices as the page links to it."""
    lines = [*_layer(rows), *_graphs(rows), *_encoders(rows), *_steps(rows), *_memory(rows)]
    return table(f"On {origin(name, rows, results)}", HEADER, lines)


def _layer(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield one convolution, forward and both gradients."""
    dense = find(rows, suite="conv", case=f"{LAYER} float32 all", masked=MASKED, way="auto", against="dense")
    masking = find(rows, suite="conv", case=f"{LAYER} float32 step eager", against="dense-and-mask fp32")
    minkowski = find(rows, suite="minkowski", case=f"{LAYER} float32 step + map eager")
    if dense:
        yield f"convolution {words(LAYER)}", percent(MASKED), *_cells(dense, masking, minkowski), "test_conv.py"


def _graphs(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield the 3x3 convolutions of a GPU, all passes as replayed graphs, by the faster of our configurations.

    With few patches masked, the one that gains least.
    """
    suite = [row for row in of_suite(rows, "conv") if row["case"].startswith("3x3 s1") and row["against"] == "dense"]
    suite = [row for row in suite if row["case"].endswith(" bfloat16 all") and row["way"].startswith("triton")]
    best: dict[tuple[str, ...], Row] = {}
    for row in sorted(suite, key=lambda row: float(row["ratio"])):
        best[row["masked"], row["case"]] = row
    shapes = [case for (case,) in distinct(suite, "case")]
    much = [best[MASKED, case] for case in shapes if (MASKED, case) in best]
    little = sorted((row for (masked, _), row in best.items() if masked == LITTLE), key=lambda row: float(row["ratio"]))
    for row in (*much, *little[:1]):
        name = words(row["case"].removesuffix(" bfloat16 all"))
        yield f"convolution {name}", percent(row["masked"]), *_cells(row, None), "gpu/kernels.py"


def best_way(rows: Sequence[Row], way: str) -> list[Row]:
    """Return the rows of a way: captured if there are such, else compiled, else as it is called."""
    found = ([row for row in rows if row["way"] == f"{way}{how}"] for how in (" graph", " compiled", ""))
    return next(filter(None, found), [])


def _encoders(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield the encoders, forward and backward; the first one with few patches masked, too.

    On a GPU as one CUDA graph, by `graphed`, and as it is called.
    """
    suite = of_suite(rows, "encoder")
    for number, (case,) in enumerate(distinct(suite, "case")):
        for masked in (MASKED, LITTLE) if number == 0 else (MASKED,):
            here = [row for row in suite if (row["case"], row["masked"]) == (case, masked)]
            ways = [(how, [row for row in here if row["way"] == f"auto{how}"]) for how in HOW]
            captured = any(own for how, own in ways if how)
            for how, own in ways:
                if own:
                    cells = _cells(hardest(own), find(own, against="dense-and-mask"), _minkowski(rows, case, masked))
                    name = f"{case.split(' batch')[0]} encoder{HOW[how] if captured else ''}"
                    yield name, percent(masked), *cells, "test_encoder.py"


def _minkowski(rows: Sequence[Row], case: str, masked: str) -> Row | None:
    """Return an encoder over MinkowskiEngine's, which meets a new mask."""
    suite = (row for row in of_suite(rows, "minkowski") if row["case"].endswith("step + map"))
    name = case.split(" batch")[0]
    return next((row for row in suite if row["case"].startswith(name) and masked == row["masked"]), None)


def _steps(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield the whole training step of the first encoder, with each decoder."""
    suite = [row for row in of_suite(rows, "step") if row["masked"] == MASKED]
    for decoder, name in STEPS.items() if suite else ():
        case = suite[0]["case"]
        own = best_way([row for row in suite if row["case"] == case], decoder)
        if own:
            cells = _cells(hardest(own), find(own, against="published"))
            yield f"{case.split()[0]} training step, {name}", percent(MASKED), *cells, "test_step.py"


def _memory(rows: Sequence[Row]) -> Iterator[Line]:
    """Yield the peak memory of the same steps, as shares of the rivals'."""
    suite = [row for row in of_suite(rows, "step_memory") if row["unit"] == "MiB"]
    for case, way in distinct(suite, "case", "way"):
        if way in ("exact", "light") and case == suite[0]["case"]:
            rivals = [find(suite, case=case, way=way, against=rival) for rival in ("dense", "published")]
            cells = [f"{1 / float(row['ratio']):.2f} of it" if row else "" for row in rivals]
            yield f"peak memory of the step, {STEPS[way]}", percent(MASKED), *cells, "", "test_memory.py"


def _cells(dense: Row | None, masking: Row | None, minkowski: Row | None = None) -> tuple[str, str, str]:
    """Return the cells over dense, over SparK's way and over MinkowskiEngine; empty where nothing was measured."""
    return ratio_cell(dense, ""), ratio_cell(masking, ""), ratio_cell(minkowski, "")
