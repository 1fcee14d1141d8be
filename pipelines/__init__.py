"""The verbs: plan, run on Ray, record. Only this package imports all the others."""

import infra  # noqa: F401  its environment defaults have to come before any import of Ray
