"""Export of networks for other programs: ONNX, torch.export, and folders for the Hugging Face hub."""
