"""Triton kernels of the streaming loop and of training, each beside a `naive.py` that says the same in plain torch."""

__all__: list[str] = []
