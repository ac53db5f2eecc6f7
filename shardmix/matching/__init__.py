"""Which tensor of one model is which of another, and whether models belong together.

parts                  which parts correspond: the model itself, modules with own weights
tensors                which tensor is which, ties resolved; or why they cannot be merged
tensor_names           names that mean one parameter: wrappers', older versions'
fused_tensors          tensors that one model stores in one piece and another in several
ties                   which tensor holds a parameter that is not stored
belonging              whether models of the same tensors belong together; asks the rest
differences            what differs: an error, or a warning if it is meant or allowed
configs                how configs differ, part by part, defaults and spellings resolved
config_labels          whether classes of one number have one name
config_dtypes          the dtypes that a config states, held against stored tensors
config_fit             what a config states and tensors contradict
tokenizers             how tokenizers differ: ids, how text is cut, settings
preprocessors          how the preparation of pictures and sounds differs
modules                how sentence-transformers modules differ
"""
