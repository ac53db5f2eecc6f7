"""Carries plans out, pass by pass.

merge                  a merge: its passes in order, the provenance, the rename
executor               the seam: jobs, tasks, results, executors, passes
thread_executor        the executor on threads of this process
jobs                   runs a job on the chosen executor; counts, reports progress, cancels
progress               events for a callback
tasks                  files divided into tasks, and tasks into chunks; pure
shared_files           files that several workers use
chunk_merger           chunks from readers through a backend to a pass's target
quantising             merged values to codes and scales, for quantised outputs
gather_pass            gathers statistics of whole tensors
factor_pass            computes low-rank factors, parameter by parameter
write_pass             writes output files
compare_pass           compares output with existing files
digest_pass            digests files as they are now
calibrate_pass         finds the faster of two devices
prepare                loads a plan's backend, tries its device, or takes another
read_ahead             asks the disk for a merge's first bytes, while the backend loads
"""
