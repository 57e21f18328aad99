"""Corpora: fetched, checked, and written as WAV files with lhotse-compatible manifests."""

__all__: list[str] = []
