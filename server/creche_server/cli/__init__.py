"""The command `creche`: serve, chat, threads, token, link, audit, scan."""

from __future__ import annotations

import sys


def main() -> None:
    """The process's entry point."""
    try:
        import cyclopts as _  # noqa: F401, PLC0415  is the server's half installed?

        from creche_server.cli.app import run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "cyclopts":
            raise
        sys.exit("creche: the command needs the server; in a checkout: pip install '.[server]'")
    except KeyboardInterrupt:  # importing takes long enough for somebody to change their mind
        sys.exit(130)
    run()
