"""Thin adapters to the outside world: Ray, DeepSpeed, MLflow, simulators.

These environment variables are read by Ray and MLflow when they are imported, or when Ray starts its processes, so they
are set before either. Whatever the user has set stays.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local start would otherwise leave a token that breaks later ones
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would end a worker that has been idle for a second, and the next one takes seconds of a core to start.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
# Prestarted workers have no runtime environment, so none of our tasks runs in them, and each takes 1 % of a core.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Ray's default niceness of 15 leaves workers a thirtieth of a busy core.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
