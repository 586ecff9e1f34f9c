"""Shim: `save_pretrained` copies this name beside the model, then puts the real configuration in its place."""

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
