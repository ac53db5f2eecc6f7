"""What other libraries mean by names, keys and files. Opens no weights.

weight_names           what weight files, shards and indexes are called, by loader
file_kinds             which files of a model's folder go along with its weights, and why
folder_kinds           what a folder is that is no model in safetensors, and the way on from it
adapters               adapters such as LoRA, by the names of their tensors
naming                 what tensor names and config keys mean to transformers
declarations           what transformers declares of its classes (ties, names), from a table
ask_transformers       a program that asks transformers of a class that the table lacks
class_defaults         what a config means that leaves a key out
config_keys            what a config's key decides: nothing, how weights are used, what they are
vocabularies           which id stands for which token, from a tokenizer's files
model_types            decoder, encoder, reranker, encoder-decoder, and what loads each
module_tree            the modules of a sentence-transformers folder
sentence_modules       the files that make a bare encoder a sentence-transformers model
mergekit_recipes       recipes of mergekit: recognised, and told in shardmix's words
"""
