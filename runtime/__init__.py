"""Runs OSP checkpoints and serves them over an OpenAI-compatible HTTP API."""
