"""What the example scripts share: the SiT, its paths and samplers, data, metrics, training."""
