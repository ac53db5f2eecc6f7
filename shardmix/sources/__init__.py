"""Models that are read, wherever they are.

base                   the seam: `Source`, an opened model, and `TensorReader`
identity               identity of a source's bytes, and the check that its files are unchanged
resolve                a source's text → its value, once; and the table of kinds of sources
located                a model's place: on this machine, or a repository on the Hub
hub                    a repository on the Hub → its commit, and the local copy of that commit
headers, checkpoint    a model in files of safetensors or torch.save, opened by their headers
rearranged             a source of parts of another one's tensors, also in another order
mapped_rows            a model with its rows in the order of another vocabulary
views                  tensors whose elements lie in a file in another order
dcp_folders, dcp       a model in a distributed checkpoint of torch
chunks                 its tensors, put together from their chunks
gathering              elements that lie apart in a file, in bounded memory
quantised              a quantised model, decoded while it is read; `quantisation` has the schemes
quantised_reader       its tensors as float32, piece by piece
adapters               LoRA adapters, opened by their config and header
adapter_matching       their matrices, matched to a base's tensors by `conventions.peft`
adapter_names          a base's tensors by the names of an adapter's modules
adapter_changes        what an adapter does to a tensor, as values
adapted                a base with an adapter applied while it is read
stacked_adapters       the matrices of several adapters as those of one
stored_factors         factors of matrices in a file of this merge's own
low_rank               the arithmetic of that, by numpy
low_rank_kernel        the same as machine code
shared_readers         readers of one worker that read the base of several sources once
open_files             open files, in bounded number
readers                byte ranges of files in, read or mapped; and streams of decoded tensors
auxiliary_files        the files that go along with the weights, found by `conventions.file_kinds`
"""
