"""Filters on what is worth training on, and detection of near-duplicates."""
