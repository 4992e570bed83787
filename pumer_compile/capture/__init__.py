"""A model as a graph, with its inputs: loading, checking, tracing, samples."""
