"""Word errors, BLEU and chrF with intervals and paired tests; lag and calibration; evaluation of models."""

__all__: list[str] = []
