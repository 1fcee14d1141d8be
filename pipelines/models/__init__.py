"""Trained models: checkpoints, what MODEL names, policies."""
