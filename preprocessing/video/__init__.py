"""Video files and other frame sources: decode, thin, excerpt."""
