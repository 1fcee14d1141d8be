"""The verbs: plan, run on Ray, record. This package alone imports all the others."""
