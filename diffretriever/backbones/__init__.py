"""Pretrained backbones that everyone can have: where they are found, and how they become a native folder."""
