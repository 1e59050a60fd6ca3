"""What a server keeps in its data directory beside the database: lock, address, signing key."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

_ADDRESS: Final = "server.json"
_KEY_BYTES: Final = 32


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server is, and what a client needs to know to talk with it."""

    url: str
    pid: int
    user: str  # whom its own link speaks for
    agents: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]  # the first is the default


class DataDirectoryError(Exception):
    """The data directory cannot be used as it is; the message says what to do."""


class AlreadyServedError(DataDirectoryError):
    """Another process serves this data directory, or this database."""


@contextlib.contextmanager
def locked(data: Path) -> Iterator[None]:
    """One server a data directory: another would take our live runs for lost ones.

    Raises AlreadyServedError. The lock goes with the process, however that ends.
    """
    _made(data)
    where = read_address(data)
    at = f" on {where.url} (process {where.pid})" if where else ""
    refusal = f"another server is at work in {data}{at}; stop it, or choose another --data"
    with locked_file(data / "lock", refusal):
        yield


@contextlib.contextmanager
def locked_file(path: str | Path, refusal: str) -> Iterator[None]:
    """Hold a lock file. Raises AlreadyServedError, in those words, if somebody else does."""
    with Path(path).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyServedError(refusal) from None
        yield


def is_open_to_others(data: Path) -> bool:
    """Whether anybody but its owner has any right in it, as in one that was there before us."""
    return bool(stat.S_IMODE(data.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO))


@contextlib.contextmanager
def address_file(
    data: Path,
    *,
    url: str,
    user: str,
    agents: Sequence[str],
) -> Iterator[None]:
    """Where `creche chat` finds the server, while it listens."""
    path = data / _ADDRESS
    address = Address(url=url, pid=os.getpid(), user=user, agents=tuple(agents))
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(msgspec.json.encode(address))
    aside.chmod(0o600)
    aside.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_address(data: Path) -> Address | None:
    """What the address file says, None if there is none."""
    try:
        return msgspec.json.decode((data / _ADDRESS).read_bytes(), type=Address)
    except (OSError, msgspec.DecodeError):
        return None


def _made(data: Path) -> None:
    """Make the directory unless it is there. Raises DataDirectoryError."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except FileExistsError as error:
        msg = f"--data: {data.absolute()} is a file"
        raise DataDirectoryError(msg) from error
    except OSError as error:
        msg = f"--data: {data.absolute()} cannot be made: {error.strerror}"
        raise DataDirectoryError(msg) from error


def load_key(data: Path) -> bytes:
    """The signing key of a data directory, made at the first call; only its owner can read it."""
    path = data / "key"
    _made(data)
    if not path.exists():
        # Written aside and then linked, so that nobody ever reads half a key.
        aside = data / f"key.{os.getpid()}"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    return read_key(data)


def read_key(data: Path) -> bytes:
    """The signing key that a server has made. Raises DataDirectoryError where there is none."""
    path = data / "key"
    try:
        key = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = f"there is no key in {data.absolute()}; start a server there first"
        raise DataDirectoryError(msg) from error
    except OSError as error:
        msg = f"{path.absolute()} cannot be read: {error.strerror}"
        raise DataDirectoryError(msg) from error
    if len(key) < _KEY_BYTES:
        msg = f"{path} is damaged; remove it to have a new one made (old tokens end)"
        raise DataDirectoryError(msg)
    return key
