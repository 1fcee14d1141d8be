"""Data contracts: what the fields of a data set mean."""
