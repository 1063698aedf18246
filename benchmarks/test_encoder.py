"""Whole encoders, forward + backward: packed against plain dense and dense-and-mask (`subjects/encoders.py`)."""

from __future__ import annotations

from .measure.scales import MASKED
from .measure.timing import in_turn
from .subjects.encoders import DENSE, DENSE_AND_MASK, encoders


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
    benchmark.pedantic(ways.steps["auto"], rounds=1)
