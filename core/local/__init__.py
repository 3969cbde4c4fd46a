"""Postgres and a Redis-protocol broker, owned by this process: the embedded service and the tests."""
