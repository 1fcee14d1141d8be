"""Bytes in, latents out, windows to a trainer. Runs without Ray."""
