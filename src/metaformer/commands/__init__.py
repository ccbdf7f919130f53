"""The programs that `metaformer COMMAND` runs; train.py, validate.py and files in scripts/ run the same functions."""
