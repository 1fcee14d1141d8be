"""Replay buffers of Diffusion Policy and UMI."""
