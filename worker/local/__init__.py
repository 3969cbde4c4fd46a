"""The embedded service: Postgres, broker, API and one worker under one folder, on one machine."""
