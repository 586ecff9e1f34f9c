"""Shim: `save_pretrained` copies this name next to the model's files, then puts the real configuration in its place."""

from duet_moe.configuration.configuration_duet_moe import DuetMoeConfig
