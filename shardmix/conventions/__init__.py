"""The conventions of other libraries: meanings of names, keys and files. Opens no weights.

weight_names           names of weight files, shards and indexes, by loader
file_kinds             auxiliary files, which go along with the weights, and kinds left out
folder_kinds           folders that are no model in safetensors, and the remedy for each
dcp_keys               the model's tensors among all that a trainer saved
adapters               adapters such as LoRA, by the names of their tensors, and in a user's text
peft                   LoRA adapters as PEFT saves them: config and names of tensors
peft_output            LoRA adapters as PEFT loads them, for those that are written
naming                 meanings of tensor names and config keys in transformers
tensor_names           names that mean one parameter: wrappers', older versions', fused ones
output_quantisations   quantisations that an output can have: tensors, names and config
declarations           declarations of transformers' classes (ties, names), from a table
ask_transformers       a program that asks transformers of a class that the table lacks
class_defaults         the meaning of a key that a config leaves out
config_keys            effect of a config's key: none, the use of the weights, their meaning
vocabularies           token by id, from a tokenizer's files
vocabulary_tensors     the parameters with a row for each token, from a table
tokenizer_splices      new tokens in a tokenizer's files
token_ids              ids of tokens and sizes of vocabularies in configs
model_types            decoder, encoder, reranker, encoder-decoder: a row each
module_tree            the modules of a sentence-transformers folder
sentence_modules       the files that make a bare encoder a sentence-transformers model
"""
