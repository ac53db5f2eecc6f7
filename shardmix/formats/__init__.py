"""Bytes of files ⇄ values, strictly read: strangers' files are judged before they are used.

safetensors_layout     headers encoded, and the length of a header; pure bytes
safetensors_header     headers decoded, in pieces, and judged
torch_file             files of torch.save: their tensors, found without running anything
torch_record           a record of a distributed checkpoint: such a file of one tensor
dcp_metadata           the description of such a checkpoint: chunks, records, names
dcp_chunks             the check that chunks fill a tensor
tensor_table           a model's tensors in columns: names, shapes, dtypes, offsets
stored_floats          stored floats as arrays, in float32 or float64
small_floats           the values of codes of 1 to 8 bits, and how they lie in bytes
matrices               matrices divided into blocks, bands and rectangles
coded_tensors          the values of quantised tensors, from codes and the scales of blocks
output_coding          matrices written as codes and scales: the seam
fp8_blocks             the coding of DeepSeek-V3's FP8
fp8_kernel             its codes by machine code
file_metadata          the `__metadata__` of output files
strict_json            config, modules and index: JSON of strangers

Every input may come from somebody who means harm. It is refused in one line that names the file,
the finding and the remedy; `tests/hostile` has hundreds of such inputs, and a fuzzer. The rules,
here and in other packages:

- Nothing is allocated because a file says so. Headers have at most 100 MB (safetensors' limit), an
  index as much, config and modules 4 MB, examples 8 MB, a recipe 128 KiB. As Python objects JSON
  may take 26 times its length, so what is decoded whole is small.
- A header may take 12 bytes of memory for each of its own, an index 4 and 250 for each pair, and
  planning 1,600 for each tensor. This is compared with `--max-memory` before anything is decoded;
  without a budget, with four fifths of the available memory. Measured for a million tensors in one
  file (70 MB of header): 3 to 5 bytes; 11 if each has the shortest of names and a shape of its own.
  The planner's own check is enough for headers below 1 MB.
- A header is decoded in pieces of 1 MiB, directly into columns, and judged before names are
  interned: an error behind a million tensors is found below 300 MB. Headers up to 1 MB are judged
  by safetensors' own parser as well (it takes 8 to 13 bytes of memory a byte); fuzzing holds both
  to the same verdict.
- JSON and YAML mean one thing. A key given twice, half a surrogate pair, or more than 64 levels are
  refused. So are YAML aliases, since nine lines of them stand for more text than any memory holds,
  and a name such as `010` that YAML takes for a number.
- Files are files, in the model's folder. Pipes, sockets and devices are never opened. Links are
  followed only in the Hub's cache: a link out of a folder from elsewhere could put a file of this
  machine into a model that is then published. The source itself may be a link, and so may a whole
  folder of shards on another disk.
- Nothing is run: no chat template is rendered, no code of a model imported by merging. The pickle
  in a file of `torch.save` goes through a machine that knows only what describes tensors; its
  memory is at most 20 times the pickle's length, which is compared with the budget first.
  The description of a distributed checkpoint has one of its own: 8 times its length (4 measured),
  20 if it is not in torch's usual forms. A record in its files may describe itself in 64 KiB.
- Nothing printed is obeyed by a terminal (`errors.printable`), and nothing printed is a secret
  (`errors.redaction`).
"""
