"""Identity that is looked up in another module: CR011."""

from . import identity
from .identity import current as who


def imported():
    return who.get()  # -> CR011


def by_module():
    return identity.run_id.get(), identity.user  # -> CR011 CR011
