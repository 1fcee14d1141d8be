"""Simulators behind one face."""
