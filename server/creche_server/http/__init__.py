"""The quart-trio application: threads, tickets, health, and the web page."""

from creche_server.http.app import make_app

__all__ = ["make_app"]
