"""Unified World Models (arXiv 2504.02792): one diffusion transformer over an action chunk and future camera latents.

Pure torch: the model, its training objective and sampling, without data or cluster code. Modules in reading order:

config       settings of the model, its diffusion and its data augmentation
batch        the model's input
randomness   generators: one per batch, or one per sample
augment      random crops and colour jitter for training
resnet       the paper's image encoder
observation  the current observation -> the condition vector
tokens       noisy actions and noisy latents -> tokens, and back
blocks       the transformer block, modulated by the condition
denoiser     the whole network: noisy actions and latents in, a prediction for each out
schedule     how noise is added, and removed step by step
objective    the training loss
sampling     one loop, five modes: policy, forward and inverse dynamics, video, joint
model        the interface of every model: ``loss(batch)`` and ``sample(mode, batch)``
world_model  UWM
baselines    the paper's comparisons
kinds        the class for each ``kind`` in the settings
optimizer    AdamW with a moving average of the weights, and its learning-rate schedule
transplant   a trained model's weights in a model with other inputs
query        the policy mode with lower latency, for a robot
metrics      errors of predicted frames and actions
published    loads published checkpoints
"""
