"""Huge models on a small machine."""
