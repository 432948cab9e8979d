"""GPU kernels in Triton and Gluon, a folder per family, installed as ``fastgru.kernels``.

They import only triton and each other. The kernels in CUDA C++ are in csrc/cuda.
"""
