"""Training: a task is a LightningModule around a model, and a recipe is its YAML. Needs the extra `train`."""

__all__: list[str] = []
