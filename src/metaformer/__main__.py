"""`python -m metaformer COMMAND`, and for several ranks `torchrun -m metaformer train`."""

from metaformer.command_line import main

if __name__ == "__main__":
    main()
