"""Masked language modelling with LION: encoders, pre-training and fine-tuning."""
