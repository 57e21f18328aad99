"""Which terms of a bank are said: Attention2Probability (arXiv 2508.18701), and the baseline of vectors."""

from speechattn.terms.bank import Bank, Found, best
from speechattn.terms.loss import calibration, contrastive, in_batch, presence_loss
from speechattn.terms.resting import RestingRetriever
from speechattn.terms.retriever import Hearing, Queries, Retriever, Running
from speechattn.terms.spelling import Spelling, Subwords
from speechattn.terms.spotter import Spotter
from speechattn.terms.text import Term, parse_terms, read_terms, written
from speechattn.terms.vector import VectorIndex, Vectors
from speechattn.terms.weights import RawRetriever

__all__ = [
    "Bank", "Found", "Hearing", "Queries", "RawRetriever", "RestingRetriever", "Retriever", "Running", "Spelling",
    "Spotter", "Subwords", "Term", "VectorIndex", "Vectors", "best", "calibration", "contrastive", "in_batch",
    "parse_terms", "presence_loss", "read_terms", "written",
]  # fmt: skip
