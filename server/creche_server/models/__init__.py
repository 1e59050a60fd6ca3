"""The models: one that is built in, any behind an OpenAI-compatible endpoint, one for tests."""

from creche_server.models.opening import UnknownModelError, open_models

__all__ = ["UnknownModelError", "open_models"]
