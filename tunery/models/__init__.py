"""Base models: what is on this machine, what shape it has, how it gets here. No torch."""

from tunery.models.shape import shape, shape_of
from tunery.models.store import ModelInfo, ModelStore

__all__ = ["ModelInfo", "ModelStore", "shape", "shape_of"]
