"""An artifact beside eager PyTorch: decisions first, then outputs."""
