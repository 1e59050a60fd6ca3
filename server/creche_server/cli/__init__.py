"""The command `creche`: serve, chat, token, link."""

from __future__ import annotations

import sys


def main() -> None:
    """The process's entry point."""
    try:
        import cyclopts as _  # noqa: F401, PLC0415  is the server's half installed?
    except ModuleNotFoundError:
        sys.exit("creche: the command needs the server: pip install 'creche[server]'")
    from creche_server.cli.app import run  # noqa: PLC0415

    run()
