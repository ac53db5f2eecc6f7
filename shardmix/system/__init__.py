"""This machine: files, memory, devices, threads. Knows nothing of models.

units                  "2GiB" ⇄ bytes
files                  free space, the limits of one call, files that are safe to open
held_folder            a folder held by its descriptor, in which no link is followed
locks                  one process at a time in a folder
hashing                files cut into leaves of 4 MiB and hashed, by any of a table of algorithms
page_cache             the pages of files that stay in the system's cache
memory, cgroups        memory taken by the process, and available to it, in a container too
buffers                buffers aligned so that copying to and from files is fast
sigbus                 a mapped page that cannot be loaded sets a mark; the process lives on
llvm                   assembly of LLVM → machine code for this processor
llvm_floats            stored floats as vectors of float32, as that assembly
gpus                   the GPUs of the machine, counted without torch
threads, timer         threads that end with their block; the time workers spend at each stage
"""
