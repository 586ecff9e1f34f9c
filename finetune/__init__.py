"""Training: corpus, tokenizer, packing, pretraining and supervised fine-tuning."""
