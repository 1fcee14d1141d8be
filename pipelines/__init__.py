"""The verbs of the command line. Only this package imports all the others."""

import infra  # noqa: F401  its environment defaults must be set before Ray is imported
