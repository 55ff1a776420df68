"""Layers that surround attention."""
