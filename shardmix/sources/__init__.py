"""Models that are read, wherever they are.

hub                    a source's text → where it lies on this machine (or is downloaded to)
headers, checkpoint    a model's tensors, from its headers: names, dtypes, shapes, offsets
open_files             files kept open, and checked to be what they were when planned
readers                byte ranges of files in: read or mapped
auxiliary_files        which files go along with the weights
"""
