"""Unified World Models (arXiv 2504.02792): one diffusion transformer over an action chunk and future camera latents.

The mathematics alone: pure torch, no files, no cluster. Read in this order:

config       what a model is made of, what its diffusion is, how its samples are varied
batch        the one thing that goes in
augment      parts of whole frames, and other colours, to train on
observation  what the robot sees now -> a condition vector
resnet       the paper's image encoder, inside it
tokens       noisy actions and noisy latents -> tokens, and back
blocks       the transformer block, modulated by the condition
denoiser     all of it together: two noisy things in, two predictions out
schedule     how noise is added, and taken away step by step
objective    the training loss
sampling     one loop, five modes: policy, forward and inverse dynamics, video, joint
world_model  the face of it all: ``loss(batch)`` and ``sample(mode, batch)``
baselines    the paper's comparisons, with the same face
kinds        the class that a model's settings ask for
transplant   a trained model's weights in one that reads something else
query        the policy mode again, sooner, for a robot that waits
metrics      how good an image, an action or a success rate is
official     reads published checkpoints
"""
