"""Thin adapters to the outside world: Ray, DeepSpeed, MLflow, simulators.

Ray and MLflow read these environment variables when they are imported, or when Ray starts its processes, so they are
set before that. Values that the user has set are kept.
"""

import os

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray would stop a worker that was idle for a second; starting the next one takes seconds of a core.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
# Prestarted workers have no runtime environment, so none of our tasks can use them; each takes 1 % of a core.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# With Ray's default niceness of 15, workers get a thirtieth of a busy core.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that does not answer is given up after three tries of 15 seconds; MLflow's own settings take minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("PGCONNECT_TIMEOUT", "15")
