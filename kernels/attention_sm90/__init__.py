"""Attention for Hopper (sm_90a) in Gluon, compiled ahead of time by tools/build_cubins.py."""
