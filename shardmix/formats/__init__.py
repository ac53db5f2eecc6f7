"""Bytes of files ⇄ values, strictly read: what strangers wrote is judged before it is used.

safetensors_layout     dtypes, and headers encoded; pure bytes
safetensors_header     headers decoded, in pieces, and judged
file_metadata          what an output file's `__metadata__` says
strict_json            config, modules and index: JSON of strangers
"""
