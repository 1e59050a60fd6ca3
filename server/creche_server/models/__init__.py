"""The models: one that is built in, any behind an OpenAI-compatible endpoint, one for tests."""

from creche_server.models.opening import Offer, UnknownModelError, open_models

__all__ = ["Offer", "UnknownModelError", "open_models"]
