"""Training recipes of `duet pretrain`, and the wordings and prompts that they use, as YAML."""
