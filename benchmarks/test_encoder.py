"""Whole encoders, forward + backward: packed against plain dense and dense-and-mask (`subjects/encoders.py`).

On a GPU also as replayed CUDA graphs, by `patchsparse.graphed` with another mask in every call, and against plain dense
compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .measure.rows import left_out
from .measure.scales import MASKED
from .measure.timing import in_turn
from .subjects.encoders import DENSE, DENSE_AND_MASK, Encoders, encoders


def test_encoder(benchmark, record, scale, encoder, masked):
    """Each engine over plain dense, over dense-and-mask and over ``gather``."""
    scale = scale.for_encoder(encoder)
    engines = ("auto", "gather") if encoder == scale.encoders[0] and masked == MASKED else ("auto",)
    ways = encoders(encoder, engines, masked, scale)
    ways.check()
    limit, floor = ways.bounds("auto")
    timing = in_turn(ways.steps, scale.rounds, warmup=1)
    for engine in engines:
        for rival in (DENSE, DENSE_AND_MASK, *(e for e in engines[1:] if engine == "auto")):
            bound = limit if rival == DENSE else None
            compared = timing.compare(engine, rival)
            record("encoder", ways.case, engine, rival, *compared, masked=masked, limit=bound, floor=floor)
    if scale.cuda:
        _replayed(record, ways, masked, limit, floor)
    benchmark.pedantic(lambda: None, rounds=1)


def _replayed(record, ways: Encoders, masked: float, limit: float, floor: float) -> None:
    """Record steps without any time of the host; dense-and-mask keeps it, since it asks the host what is visible.

    A step by `patchsparse.graphed`, called as in a loop of one's own, has some of it.
    """
    found: dict[str, Callable[[], object]] = {}
    makers = {f"{way} graph": partial(ways.captured, way) for way in ("auto", DENSE)}
    makers["auto graphed"] = partial(ways.graphed, "auto")
    for way, make in makers.items():
        try:
            found[way] = make()
        except (RuntimeError, AssertionError) as error:
            record.row(left_out(ways.case, way, str(error), masked))
            ways.check()  # a replay that differs closed the gate for the others, too
    found[DENSE_AND_MASK] = ways.steps[DENSE_AND_MASK]
    if DENSE in ways.scale.compiled:
        found[f"{DENSE} compiled"] = ways.compiled(DENSE)  # from now on it is no other way
    else:
        found[DENSE] = ways.steps[DENSE]
    own = [way for way in found if way.startswith("auto")]
    if not own:
        found["auto"] = ways.steps["auto"]
        own = ["auto"]
    timing = in_turn(found, ways.scale.rounds, warmup=2)
    for way in own:
        for rival in (rival for rival in found if rival not in own):
            bound = limit if rival.startswith(DENSE) and rival != DENSE_AND_MASK else None
            compared = timing.compare(way, rival)
            record("encoder", ways.case, way, rival, *compared, masked=masked, limit=bound, floor=floor)
