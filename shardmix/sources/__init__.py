"""Models that are read, wherever they are.

base                   the seam: `Source`, an opened model, and `TensorReader`
identity               what a source's bytes are known by, and whether its files are still those
hub                    a source's text → where it lies on this machine (or is downloaded to)
headers, checkpoint    a model in safetensors files, opened by its headers
open_files             files kept open, in bounded number
readers                byte ranges of files in, read or mapped; and streams of decoded tensors
auxiliary_files        which files go along with the weights
"""
