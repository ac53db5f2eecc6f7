"""Backends: who does the arithmetic, a chunk of every source to a chunk of output.

backend                the seam, and which backend a plan takes
chunk_size             how many elements a chunk holds
torch_cpu, torch_cuda  torch, every float dtype; on GPUs with copies beside the sums
torch_ops              the arithmetic on torch's tensors
llvm_cpu               compiled kernels: 16- and 32-bit floats on the CPU, no torch needed
llvm_compile           compiles them
llvm_assembly, llvm_loops  their text
keep_first             integers and booleans
nonfinite              counts NaN and Inf, only where there are some
"""
