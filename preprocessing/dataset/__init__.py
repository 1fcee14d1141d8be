"""From a snapshot to training batches: selection, normalisation, sample order, local copies."""
