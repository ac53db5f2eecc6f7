"""The correspondence of tensors between models, and the check that models belong together.

parts                  corresponding parts: the model itself, modules with weights of their own
tensors                corresponding tensors, ties resolved; or the reason they cannot be merged
tensor_names           names that mean one parameter: wrappers', older versions'
fused_tensors          tensors that one model stores in one piece and another in several
ties                   the tensor that holds a parameter that is not stored
belonging              the check of models with the same tensors; calls the modules below
differences            differences: an error, or a warning if they are minor or allowed
configs                differences of configs, part by part, defaults and spellings resolved
config_labels          names of classes with the same number
config_dtypes          the dtypes that a config states, compared with stored tensors
config_fit             statements of a config that tensors contradict
tokenizers             differences of tokenizers: ids, splitting of text, settings
preprocessors          differences in the preparation of pictures and sounds
modules                differences of sentence-transformers modules
"""
