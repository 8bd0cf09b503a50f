"""Tools: prediction, calibration of the gate bias, preparation of ImageNet."""
