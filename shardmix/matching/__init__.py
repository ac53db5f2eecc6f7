"""The correspondence of tensors between models, and the check that models belong together.

parts                  corresponding parts: the model itself, modules with weights of their own
tensors                corresponding tensors, ties resolved; or the reason they cannot be merged
fused_tensors          tensors that one model stores in one piece or turned, another in several
ties                   the tensor that holds a parameter that is not stored
tied_copies            names of tied parameters that files of torch.save give twice
belonging              the check of models with the same tensors; calls the modules below
differences            differences: an error, or a warning if they are minor or allowed
configs                differences of configs, part by part
config_spelling        one spelling for keys, defaults and parts that versions write in several
config_labels          names of classes with the same number
config_dtypes          the dtypes that a config states, compared with stored tensors
config_fit             statements of a config that tensors contradict
tokenizers             differences of tokenizers: ids, splitting of text, settings
model_tokens           a model's tokens, each with one id
mapped_tensors         tensors with a row for each token, and their correspondence
vocabulary_maps        the output's vocabulary, and the row of every token in every model
preprocessors          differences in the preparation of pictures and sounds
modules                differences of sentence-transformers modules

A sentence-transformers model is a chain of modules, and each may store weights in its own
folder: a projection (`2_Dense/`), the encoder itself (`0_Transformer/`), the two sides of a Router.
Each folder with safetensors weights is a part: a `Source` of its own, with its own config,
ties, dtypes and shards, so that names in one are never taken for names in another. Parts correspond
by their position in the chain (`Dense 1`, `query/Transformer 1`), whatever their folders are
called; the output's folders are the config source's. In messages a tensor's name follows its folder
(`2_Dense/linear.weight`). The output's modules are the config source's, or if it has none those of
the first model that has some.

Buffers that transformers computes itself (`position_ids`, `rotary_emb.inv_freq`, ...) are left out
if not every model has them, with a warning. Any other difference between tensor sets is an error.
"""
