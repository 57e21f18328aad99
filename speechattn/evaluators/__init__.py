"""The doors of evaluators: our sessions inside SimulEval and simulstream. Only these modules need the tools."""

__all__: list[str] = []
