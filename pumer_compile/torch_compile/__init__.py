"""`torch.compile(model, backend="pumer")`: from Dynamo's graph to the passes, and back."""
