"""How curved the training loss is: Gauss-Newton sharpness, and a callback that watches it."""
