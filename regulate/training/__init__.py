"""What belongs to training a regulated network: calibration, freezing, watching gradients."""
