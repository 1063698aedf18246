"""Whole encoders, forward + backward: packed against plain dense and against dense-and-mask (`encoders.py`)."""

from __future__ import annotations

from .measure.timing import in_turn
from .subjects.encoders import DENSE, MASKED, encoders


def test_encoder(benchmark, record, scale, encoder, masked):
    scale = scale.for_encoder(encoder)
    engines = ("auto", "gather") if encoder == scale.encoders[0] and masked == 0.6 else ("auto",)
    ways = encoders(encoder, engines, masked, scale)
    ways.check()
    limit, floor = ways.bounds("auto")
    timing = in_turn(ways.steps, scale.rounds, warmup=1)
    for engine in engines:
        for rival in (DENSE, MASKED, *(e for e in engines[1:] if engine == "auto")):
            bound = limit if rival == DENSE else None
            ratio, values = timing.ratio(rival, engine), timing.medians(engine, rival)
            record("encoder", ways.case, engine, rival, ratio, values, "s", masked=masked, limit=bound, floor=floor)
    benchmark.pedantic(ways.steps["auto"], rounds=1)
