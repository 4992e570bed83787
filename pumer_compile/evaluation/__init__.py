"""Does it still answer right: an artifact beside the unreduced model, and beside controls that cost the same."""
