"""fusedres: fused kernels that make convolutional residual networks train and infer faster in less memory."""
