"""Triton counterparts of the kernels in csrc. None yet: importing this package gives you nothing to call."""
