"""`python -m creche_server` is `creche`."""

from creche_server.cli import main

main()
