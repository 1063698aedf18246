"""Tables of docs/benchmarks.md, from the rows of one device."""

from __future__ import annotations

from collections.abc import Sequence

from ..measure.rows import LEFT_OUT, Row, words
from .markdown import distinct, find, hardest, is_dense, of_suite, origin, percent, ratio_cell, table, wrapped

__all__ = ["device_page"]

WAYS = {
    "auto": "packed",
    "gather": "packed, `gather` (pure PyTorch)",
    "exact": "`unet`, exact",
    "sparse": "`unet`, [sparse decoding](decoding.md)",
    "light": "`light`",
    "dense": "best dense step of our own",
    "published": "published way",
}


def named(way: str) -> str:
    """Return a way in words: what runs, and whether it was captured or compiled."""
    plain, _, how = way.partition(" ")
    return WAYS.get(plain, plain) + {"": "", "graph": ", CUDA graph"}.get(how, f", {how}")


def encoder_table(rows: Sequence[Row]) -> str:
    """Return packed encoders over plain dense and over dense-and-mask."""
    lines = []
    suite = of_suite(rows, "encoder")
    for case, masked, way in distinct((r for r in suite if is_dense(r["against"])), "case", "masked", "way"):
        known = {"case": case, "masked": masked, "way": way}
        over = [hardest(suite, **known), find(suite, **known, against="dense-and-mask")]
        limit = over[0]["limit"] if over[0] else ""
        limit = f"{float(limit):.2f}" if limit else ""
        name = f"{words(case)}, {named(way)}"
        lines.append((name, percent(masked), ratio_cell(over[0]), limit, ratio_cell(over[1])))
    header = ("encoder", "masked", "over plain dense", "limit", "over dense-and-mask")
    return table("**Whole encoder**, forward + backward: `pytest benchmarks/test_encoder.py`", header, lines)


def layer_table(rows: Sequence[Row]) -> str:
    """Return single layers over plain dense, all passes together."""
    whole = of_suite(rows, "conv")
    suite = [row for row in whole if row["against"] == "dense" and row["limit"]]
    sums = [row for row in suite if row["case"].endswith(" all") and row["way"] == "auto"]
    lines = []
    for shape in dict.fromkeys(row["case"].rsplit(" ", 2)[0] for row in sums):
        cells = [find(sums, case=f"{shape} {dtype} all", way="auto") for dtype in ("float32", "bfloat16")]
        found = next(cell for cell in cells if cell)
        passes = [find(suite, case=f"{shape} float32 {side}", way="auto") for side in ("fwd", "dgrad", "wgrad")]
        half = ratio_cell(find(whole, case=f"{shape} all", way="bfloat16", against="float32"))
        apart = " / ".join(f"{float(row['ratio']):.1f}" if row else "-" for row in passes)
        lines.append(
            (words(shape), ratio_cell(cells[0]), apart, f"{float(found['limit']):.2f}", ratio_cell(cells[1]), half)
        )
    header = ("layer", "float32", "forward / dgrad / wgrad", "limit", "bfloat16", "ours, bfloat16 over float32")
    title = (
        "**Single layers**, forward + both gradients, 60 % masked, over plain dense: `pytest benchmarks/test_conv.py`"
    )
    return table(title, header, lines)


def graph_table(rows: Sequence[Row]) -> str:
    """Return the passes of layers on a GPU as replayed graphs, over dense cuDNN."""
    suite = [r for r in of_suite(rows, "conv") if r["against"] == "dense" and r["way"].startswith("triton")]
    lines = []
    for shape, masked in dict.fromkeys((r["case"].rsplit(" ", 1)[0], r["masked"]) for r in suite):
        cells = [words(shape), percent(masked)]
        for side in ("fwd", "dgrad", "wgrad", "all"):
            tried = [r for r in suite if r["case"] == f"{shape} {side}" and r["masked"] == masked]
            cells.append(ratio_cell(max(tried, key=lambda r: float(r["ratio"]), default=None)))
        found = find(suite, masked=masked, case=f"{shape} fwd")
        lines.append((*cells, f"{float(found['limit']):.2f}" if found and found["limit"] else ""))
    title = "**Single layers**, replayed CUDA graphs, over dense cuDNN: `python -m benchmarks.gpu.kernels`"
    return table(title, ("layer", "masked", "forward", "dgrad", "wgrad", "all three", "limit"), lines)


def peer_table(rows: Sequence[Row]) -> str:
    """Return our engine over other libraries, called from Python."""
    suite = [r for r in of_suite(rows, "conv") if r["case"].endswith((" eager", "graph")) and r["unit"] == "ms"]
    suite = [r for r in suite if " step" in r["case"]]
    lines = [(words(r["case"]), percent(r["masked"]), r["way"], r["against"], ratio_cell(r)) for r in suite]
    title = (
        "**Over other libraries**, forward + backward; `+ map`: their kernel map built anew, as each new mask needs it"
    )
    return table(title, ("layer", "masked", "ours", "library", "ours over it"), lines)


def step_table(rows: Sequence[Row]) -> str:
    """Return whole steps over the published way and over the best dense step."""
    suite = [row for row in of_suite(rows, "step") if row["masked"]]
    lines = []
    for case, way in distinct(suite, "case", "way"):
        over = [find(suite, case=case, way=way, against="published"), hardest(suite, case=case, way=way)]
        seconds = next(row["value"] for row in over if row)
        last = "1" if way == "dense" else ratio_cell(over[1])
        name = named(way)
        lines.append((words(case), name, f"{float(seconds):.3g} s", ratio_cell(over[0]), last))
    title = (
        "**Whole training step**, 60 % masked, over the published way (dense-and-mask, NCHW, eager, the whole image "
        "decoded) and over the best dense step of our own (whole images, channels_last, masking for free): "
        "`pytest benchmarks/test_step.py`"
    )
    return table(title, ("step", "decoder", "a step", "over published", "over best dense"), lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Return peak memory above weights and moments."""
    suite = [row for row in rows if row["suite"] in ("encoder_memory", "step_memory") and row["unit"] == "MiB"]
    suite = [row for row in suite if row["against"] != "estimate"]
    lines = []
    for kind, case, way in distinct(suite, "suite", "case", "way"):
        rivals = [row for row in suite if (row["suite"], row["case"], row["way"]) == (kind, case, way)]
        shares = ", ".join(f"{1 / float(row['ratio']):.2f} of {row['against']}" for row in rivals)
        what = f"{kind.split('_')[0]}, {words(case)}"
        lines.append((what, WAYS.get(way, way), f"{float(rivals[0]['value']):.0f} MiB", shares))
    title = "**Peak memory** above weights and moments, 60 % masked: `pytest benchmarks/test_memory.py`"
    return table(title, ("what", "way", "peak", "share"), lines)


def batch_table(rows: Sequence[Row]) -> str:
    """Return the largest batches that fit GPUs, as they are estimated."""
    suite = [row for row in of_suite(rows, "step_memory") if row["unit"] == "windows"]
    lines = []
    for what, way in dict.fromkeys((row["case"].split(" largest")[0], row["way"]) for row in suite):
        fits = [row for row in suite if row["case"].startswith(f"{what} largest") and row["way"] == way]
        lines.append((what, way, " / ".join(f"{float(row['value']):.0f}" for row in fits)))
    return table("**Largest batch**, estimated", ("step", "way", "on 16 / 24 / 80 GB"), lines)


def minkowski_table(rows: Sequence[Row]) -> str:
    """Return ours over MinkowskiEngine, whole steps of layers and encoders, for masks met before and for new ones."""
    suite = of_suite(rows, "minkowski")
    new = {row["case"]: row for row in suite if " + map" in row["case"]}
    lines = []
    for row in suite:
        if " fwd" not in row["case"] and row["case"] not in new:
            renewed = next((r for case, r in new.items() if case.replace(" + map", "") == row["case"]), None)
            lines.append((words(row["case"]).removesuffix(" eager"), ratio_cell(row), ratio_cell(renewed)))
    title = "**Over MinkowskiEngine**, forward + backward, 60 % masked: `pytest benchmarks/test_minkowski.py`"
    return table(title, ("what", "mask met before", "new mask"), lines)


def other_table(rows: Sequence[Row], suite: str, title: str) -> str:
    """Return a suite as it is: what, way, against, ratio."""
    lines = [
        (words(r["case"]), percent(r["masked"]), r["way"], r["against"], ratio_cell(r)) for r in of_suite(rows, suite)
    ]
    return table(title, ("what", "masked", "way", "against", "times faster"), lines)


def left_out_table(rows: Sequence[Row]) -> str:
    """Return what was not measured, and why."""
    lines = [
        (words(r["case"]), percent(r["masked"]), r["way"], r["reason"].replace("|", "/"))
        for r in of_suite(rows, LEFT_OUT)
    ]
    return table("**Left out**", ("what", "masked", "way", "reason"), lines)


def device_page(name: str, rows: Sequence[Row], results: str, pictures: Sequence[str]) -> str:
    """Return what docs/benchmarks.md shows of a device."""
    parts = [
        f"### {rows[0]['device']}",
        wrapped(origin(name, rows, results)),
        *pictures,
        encoder_table(rows),
        step_table(rows),
        memory_table(rows),
        batch_table(rows),
        minkowski_table(rows),
        layer_table(rows),
        graph_table(rows),
        peer_table(rows),
        other_table(rows, "images", "**Images/s** of a training step: `pytest benchmarks/test_step.py`"),
        other_table(rows, "pool", "**Pooling**: `pytest benchmarks/test_pool.py`"),
        other_table(rows, "norm", "**Norms**: `pytest benchmarks/test_norm.py`"),
        other_table(
            rows, "data", "**Input pipeline** over the fastest step that consumes it: `pytest benchmarks/test_data.py`"
        ),
        left_out_table(rows),
    ]
    return "\n\n".join(part for part in parts if part)
