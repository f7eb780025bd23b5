"""Triton kernels, one file an idea: reference, kernel, launcher, cost.  Installed as ``fastrunner.kernels``.

Nothing is imported here: triton is an extra, and a run that stays on the CPU never pays for it.
"""
