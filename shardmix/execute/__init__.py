"""Carries plans out, pass by pass.

execution              the passes of a merge in order, the provenance, the rename
executor               the seam: jobs, tasks, results, executors, passes
threads                the executor on threads of this process
run                    runs a job on the chosen executor; counts, reports progress, cancels
progress               events for a callback
tasks                  files divided into tasks, and tasks into chunks; pure
shared_files           files that several workers use
merging                chunks from readers through a backend to a pass's target
gather                 the pass that gathers statistics of whole tensors
write                  the pass that writes output files
compare                the pass that compares output with existing files
digest                 the pass that digests files as they are now
calibrate              the pass that finds the faster of two devices
prepare                loads a plan's backend, tries its device, or takes another
read_ahead             asks the disk for a merge's first bytes, while the backend loads
"""
