"""What executes an artifact: onnxruntime, TensorRT, TensorRT-RTX, OpenVINO."""
