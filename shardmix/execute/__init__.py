"""Carries plans out.

executor               runs a plan's tasks on threads; progress, cancellation, the end
prepare                loads a plan's backend, tries its device, or takes another
calibrate              which of two devices is the faster, by trying
read_ahead             what a merge begins with, asked of the disk while the backend loads
tasks                  an output file divided into blocks, and these into chunks; pure
task_queue             blocks handed to workers; what is done and found
worker                 what each worker does: chunks from readers through reducers to output
comparison             as writing, but held against a file that exists
anomaly_places         which tensors hold the NaN, Inf or differing integers of a chunk
"""
