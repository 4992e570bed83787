"""Everything that is to be measured on a GPU, in one command that stops by itself: `python -m benchmarks.gpu`."""
