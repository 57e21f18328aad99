"""From frames to hypotheses."""

from speechattn.search.beam import Beam, Hypothesis, Prefixes, Search
from speechattn.search.draft import Draft

__all__ = ["Beam", "Draft", "Hypothesis", "Prefixes", "Search"]
