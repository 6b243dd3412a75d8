"""What runs a calibration inside a Lightning Trainer: data, ranks, weights, progress, and what comes out."""
