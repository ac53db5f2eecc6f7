"""Backends of the arithmetic: a chunk of every source to a chunk of output.

backend                the seam, and the backend of a plan
staged_chunk           the buffers of a chunk on the CPU
torch_cpu, torch_cuda  torch, every float dtype; on GPUs with copies beside the kernels
torch_ops              the arithmetic on torch's tensors
llvm_cpu               compiled kernels: 16- and 32-bit floats on the CPU, no torch needed
llvm_compile           compiles them
llvm_kind              what a kernel is compiled for
llvm_assembly, llvm_loops  the text of kernels
llvm_trace             the text of a method between loading and rounding
keep_first             integers and booleans
truncated_svd          low-rank factors of matrices and of products
nonfinite              counts NaN and Inf, only if there are some

The bytes of an output depend on recipe and sources only. Tests drive layouts, dtypes, numbers of
models, chunks and workers against an oracle in numpy and float64, and hold all backends to the same
bits. Three traps on the way:

- torch rounds float64 to 16 bits by way of float32, so twice. The first step rounds to odd here,
  which makes the result correctly rounded.
- torch's vector and scalar conversions of NaN to bfloat16 differ (0xFFFF and 0x7FC0), so the output
  would depend on the end of a chunk. Here every NaN has one bit pattern.
- Copying is up to six times as fast if source and target lie half a page apart (`system.buffers`).

On a GPU that fails, the merge ends with `DeviceError`. Its finished leaves stay, and the same
command goes on from them, on the CPU as well. `--device cuda` takes every GPU that
CUDA_VISIBLE_DEVICES shows. Workers are dealt to GPUs in turn and stay with their files, at least
two a GPU. The plan counts GPUs in `/proc/driver/nvidia/gpus`, since it imports no torch.
"""
