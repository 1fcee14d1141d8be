"""File formats whose libraries trust their input, read safely."""
