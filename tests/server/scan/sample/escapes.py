"""Escapes: CR090, CR091, and where they count."""

import functools
import os

TABLE = {}  # creche: shared filled on import only
NOT_SAID = {}  # creche: shared # -> CR001 CR090
NO_WORDS = {}  # creche: shared  --- # -> CR001 CR090
BESIDE = {}  # noqa: S105  # creche: shared only read
LONG = {  # creche: shared only read
    "a": 1,
}
NOTHING = ()  # creche: shared for no reason at all # -> CR091
TEXT = "# creche: shared not a comment"
# creche: shared this line stands alone # -> CR091
print(  # creche: shared said where the statement begins
    os.umask(0),
)


@functools.cache
def profile(user_id):  # creche: shared one user is all there is
    return user_id


def appends(  # creche: shared the default is never written
    item,
    into=[],
):
    into2 = {}  # creche: shared is local anyway # -> CR091
    return into, item, into2


class Agent:  # creche: shared its attributes are not explained here # -> CR091
    items = []  # -> CR002
    names = []  # creche: shared only read
