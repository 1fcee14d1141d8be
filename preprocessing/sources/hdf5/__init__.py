"""Readers of the formats in HDF5, and what they share."""
