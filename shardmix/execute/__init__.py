"""Carries plans out, pass by pass.

execution              what a merge does: the passes in order, the provenance, the rename
executor               the seam: jobs, tasks, results; what an executor and a pass are
threads                the executor on threads of this process
run                    runs a job on the chosen executor; counts, tells progress, cancels
progress               events for a callback
tasks                  files divided into tasks, and these into chunks; pure
shared_files           files that several workers are at
merging                chunks from readers through reducers to a pass's target
write                  the pass that writes output files
compare                the pass that compares output with files that exist
calibrate              the pass that finds which of two devices is faster
prepare                loads a plan's backend, tries its device, or takes another
read_ahead             asks the disk for what a merge begins with, while the backend loads
"""
