"""Merges on one GPU, beside the CPU, the floor and the GPU's own link."""
