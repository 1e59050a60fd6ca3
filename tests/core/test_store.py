"""The store in memory keeps the contract of all stores."""

from __future__ import annotations

import pytest
from tests.store_contract import StoreContract

from creche import MemoryStore, Store, new_epoch


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


def test_an_epoch_is_never_the_same_twice() -> None:
    assert len({new_epoch() for _ in range(1000)}) == 1000
