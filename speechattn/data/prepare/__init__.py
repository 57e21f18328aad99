"""Corpora from what their makers publish to sounds and manifests; the contract is in `manifests`."""

__all__: list[str] = []
