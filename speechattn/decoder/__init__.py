"""From encoder frames and earlier tokens to the next token."""

__all__: list[str] = []
