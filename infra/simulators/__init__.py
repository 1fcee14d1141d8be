"""Simulators behind one Gymnasium-like face."""
