"""Weights from examples: time, peak memory and reads beside other tools."""
