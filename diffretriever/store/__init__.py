"""Stores of encoded texts: format, identity, compression."""
