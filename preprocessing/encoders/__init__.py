"""Frozen encoders: frames to latents, instructions to vectors."""
