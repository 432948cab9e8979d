"""Triton kernels, installed as ``fastgru.kernels``. They import only triton and each other."""
