"""The paper's comparisons (section IV-A, appendix B): same batches, same interface and about the same size as UWM.

dp   diffusion of actions alone
pad  joint diffusion of actions and future latents, under one timestep
gr1  no diffusion: the future, then the action, by regression
"""
