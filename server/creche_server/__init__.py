"""The server: creche over WebSocket and HTTP, kept in a database."""
