"""Registration and promotion of policies."""
