"""Measurements on a source, to write a contract from or to check one against."""
