//! Against numbers made with PyTorch in float64.
