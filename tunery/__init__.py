"""Tunery's training library. Importing it loads pydantic and nothing heavier."""

__version__ = "0.1.0"
