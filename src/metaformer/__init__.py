"""Distributed ImageNet training that reproduces "MetaFormer Is Actually What You Need for Vision" (CVPR 2022)."""

__version__ = "0.1.0"
