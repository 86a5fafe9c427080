"""Trains compact outlier-safe models and exports them as plain Hugging Face Llama checkpoints."""
