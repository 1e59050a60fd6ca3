"""What the models' tests have in common: an endpoint to talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.server.models.fake_openai import FakeEndpoint, open_fake_endpoint


@pytest.fixture
async def endpoint() -> AsyncIterator[FakeEndpoint]:
    """Answers with what the test puts into its `replies`."""
    async with open_fake_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def _no_account_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have one with a provider, and a proxy."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
