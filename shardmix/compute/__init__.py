"""Backends of the arithmetic: a chunk of every source to a chunk of output.

backend                the seam, and the backend of a plan
chunk_size             the number of elements of a chunk
staged_chunk           the buffers of a chunk on the CPU
torch_cpu, torch_cuda  torch, every float dtype; on GPUs with copies beside the kernels
torch_ops              the arithmetic on torch's tensors
llvm_cpu               compiled kernels: 16- and 32-bit floats on the CPU, no torch needed
llvm_compile           compiles them
llvm_kind              the kinds of kernels
llvm_assembly, llvm_loops  the text of kernels
llvm_trace             the text of a method between loading and rounding
keep_first             integers and booleans
nonfinite              counts NaN and Inf, only if there are some
"""
