"""Speech and a language model in one sequence: what it looks at, and what it should not."""

__all__: list[str] = []
