"""A PostgreSQL database of a test's own, and a role in it that is bound by its policies."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

# Whoever runs the tests over the local socket, or the superuser over loopback.
_CANDIDATES = ("postgresql:///test", "postgresql://postgres@127.0.0.1:5432/postgres")


def admin_url() -> str:
    """Where databases and roles may be made. Skips the test if that is nowhere."""
    chosen = os.environ.get("CRECHE_TEST_POSTGRES")
    reasons = []
    for url in (chosen,) if chosen else _CANDIDATES:
        try:
            with psycopg.connect(url, connect_timeout=3) as connection:
                row = connection.execute(
                    "SELECT rolsuper FROM pg_roles WHERE rolname = current_user",
                ).fetchone()
        except psycopg.OperationalError as error:
            reasons.append(f"{url}: {str(error).splitlines()[0]}")
            continue
        if row is not None and row[0]:
            return url
        reasons.append(f"{url}: not a superuser")
    reason = f"no PostgreSQL to make databases in ({'; '.join(reasons)})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def new_database() -> Iterator[str]:
    """The URL of a fresh database for a fresh role, who owns it and is no superuser."""
    admin = admin_url()
    name, password = f"creche_{secrets.token_hex(6)}", secrets.token_hex(16)
    identifier = sql.Identifier(name)
    with psycopg.connect(admin, autocommit=True) as connection:
        host = connection.info.host
        port = connection.info.port
        create_role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} NOSUPERUSER NOBYPASSRLS")
        connection.execute(create_role.format(identifier, sql.Literal(password)))
        connection.execute(sql.SQL("CREATE DATABASE {0} OWNER {0}").format(identifier))
    # Over loopback, with a password: so a new role may log in under every usual pg_hba.conf.
    host = "127.0.0.1" if host.startswith("/") else host
    try:
        yield f"postgresql://{name}:{password}@{host}:{port}/{name}"
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))
            connection.execute(sql.SQL("DROP ROLE {}").format(identifier))
