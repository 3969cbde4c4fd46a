"""Postgres and a Redis-protocol broker owned by this process."""
