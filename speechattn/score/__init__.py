"""Word error rate, lag and calibration."""

__all__: list[str] = []
