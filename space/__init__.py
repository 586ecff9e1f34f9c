"""The Gradio Space: one shared prompt, two panels that write side by side. Needs the `space` extra."""
