"""``uwm ingest``: raw robot logs and videos into a latent store."""
