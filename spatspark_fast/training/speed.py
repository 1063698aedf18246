"""Sum up how fast a run was, and where its time went."""

__all__ = ["Speed"]


class Speed:
    """Add up windows and seconds of a run, without its first row, which warms up, if there are others."""

    def __init__(self) -> None:
        self.rows = 0
        self.windows = 0
        self.seconds: dict[str, float] = {}

    def add(self, windows: int, parts: dict[str, float]) -> dict[str, float]:
        """Add a row with its seconds by part; return its columns: images/s, and shares of the time."""
        if self.rows == 1:
            self.windows, self.seconds = 0, {}
        self.rows += 1
        self.windows += windows
        self.seconds = {part: self.seconds.get(part, 0.0) + parts.get(part, 0.0) for part in {**self.seconds, **parts}}
        return _columns(windows, parts)

    def summary(self) -> dict[str, float]:
        """Return images/s and the shares over the run, under the names of the columns."""
        return _columns(self.windows, self.seconds)


def _columns(windows: int, parts: dict[str, float]) -> dict[str, float]:
    total = max(sum(parts.values()), 1e-9)
    shares = {f"{part}_share": parts[part] / total for part in parts if part not in ("data", "other")}
    return {"images_per_s": windows / total, "data_wait_share": parts.get("data", 0.0) / total, **shares}
