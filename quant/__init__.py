"""Turns a Hugging Face Llama checkpoint into a 4-bit checkpoint with one scale a tensor."""
