"""Merges on a GPU beside the CPU, the floor and the GPU's own link."""
