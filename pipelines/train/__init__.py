"""``uwm pretrain`` and ``uwm finetune``."""
