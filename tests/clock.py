"""A clock that goes on when it is told to."""


class Clock:
    """Seconds of whole numbers, so that sums are exact."""

    def __init__(self, monotonic=1000.0, wall=1_700_000_000.0):
        self._monotonic, self._wall = monotonic, wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Time goes by."""
        self._monotonic += seconds
        self._wall += seconds

    def jump(self, seconds: float) -> None:
        """Somebody sets the wall clock."""
        self._wall += seconds

    def restart(self) -> None:
        """The machine is started again: its monotonic clock begins anew."""
        self._monotonic = 8.0
