"""The latent store: transactions, snapshots, catalogue, statistics."""
