"""Quantised storage that is known, and how a model's tensors reveal it. Reads headers.

stored                 a model's tensors by name, and what its config declares
coded                  a quantised tensor: its codes, its scales, its coding
schemes                the table of schemes; the tensors that none of them explains
fp8                    8-bit floats, by tensor, channel or block
fp4                    4-bit floats, by groups: NVFP4 and MXFP4
experts                gpt-oss' experts in MXFP4
integers               integers of 1 to 8 bits, by groups

A scheme is a function that finds its tensors. What they are then is told by a `Coding`; so no
scheme decodes anything itself (`formats.coded_tensors`).
"""
