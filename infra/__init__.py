"""Adapters to the outside world, each thin: MLflow, DeepSpeed, Ray, simulators."""
